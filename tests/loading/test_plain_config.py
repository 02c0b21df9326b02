"""Configs that are read without transformers say what transformers reads in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyModels
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from reprise.loading import open_checkpoint
from reprise.loading.plain_config import plain_config
from reprise.models.config_reader import head_size

KINDS = ("llama", "mistral", "qwen2", "qwen3")
READ = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps",
    "rope_parameters", "eos_token_id", "tie_word_embeddings", "architectures", "attention_bias",
    "mlp_bias", "sliding_window", "layer_types", "dtype", "quantization_config", "model_type",
)  # fmt: skip
"""Fields that something here reads."""
PLAIN: dict[str, Any] = {
    "architectures": ["A"], "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "eos_token_id": 2,
}  # fmt: skip
NEEDED = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 32}}
FULL = ["full_attention", "full_attention"]
SLIDING = ["full_attention", "sliding_attention"]
VALUES: dict[str, list[Any]] = {
    "architectures": [["A", "B"], None],
    "vocab_size": [1, 0, -1, 2.0, "160", None, True, 151936],
    "hidden_size": [66, 65, "64", 64.0, None],
    "intermediate_size": [0, 5, None],
    "num_hidden_layers": [1, 3, 0, 2.5],
    "num_attention_heads": [1, 0, 8, "4"],
    "num_key_value_heads": [4, 3, 0, None],
    "max_position_embeddings": [1, None, 1 << 40, 2.0],
    "hidden_act": ["gelu", None, 5],
    "rms_norm_eps": [1, 0, 0.0, "1e-5", None, -1.0],
    "rope_parameters": [
        None, {}, {"rope_type": "default"}, {"rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 10000}, {"rope_type": "linear", "rope_theta": 1e4,
        "factor": 2.0}, {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "x",
    ],
    "rope_theta": [1e4, 10000, None],
    "eos_token_id": [None, [2, 3], [], -1, "2", 999, [None]],
    "bos_token_id": [None, 1, -1, [1]],
    "pad_token_id": [None, 0, -1],
    "tie_word_embeddings": [True, False, None, 1, "true"],
    "attention_bias": [True, False, None, 0],
    "mlp_bias": [True, False, None],
    "head_dim": [16, 64, None, 0, 7, "16"],
    "sliding_window": [None, 32, 0, "32"],
    "use_sliding_window": [False, True, None],
    "max_window_layers": [1, 28, None],
    "layer_types": [FULL, SLIDING, FULL[:1], None, "x", []],
    "dtype": ["bfloat16", "float32", "float16", "float64", "nonsense", None],
    "torch_dtype": ["bfloat16", "float16", None, "int8"],
    "quantization_config": [{"quant_method": "fp8"}, {}, None],
    "attention_dropout": [0.0, 0.5, 0, None],
    "initializer_range": [0.02, 0, None],
    "transformers_version": ["4.40.0", 5],
    "use_cache": [True, None],
    "pretraining_tp": [1, None],
    "no_such_field": [1],
    "num_labels": [2, 10**9],
    "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [128],
    "attention_multiplier": [0.5],
    "per_layer_config": [None, {}],
}  # fmt: skip
MISSING = object()
CHANGES = st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from([*VALUES[name], MISSING]))
)


def compare(found: Any, kind: str, raw: dict[str, Any]) -> None:
    expected = CONFIG_MAPPING[kind](**json.loads(json.dumps(raw)))
    for name in READ:
        assert getattr(found, name, None) == getattr(expected, name, None), name
    # Qwen2's has no such field, which means the same.
    assert head_size(found) == head_size(expected)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(changes=st.lists(CHANGES, max_size=4))
def test_what_transformers_reads(kind: str, changes: list[tuple[str, Any]]) -> None:
    raw = {**PLAIN, **NEEDED.get(kind, {})}
    for name, value in changes:
        if value is MISSING:
            raw.pop(name, None)
        else:
            raw[name] = value
    found = plain_config(kind, raw)
    if found is not None:
        compare(found, kind, raw)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_alone(kind: str) -> None:
    """Each is either read alike, or left to transformers; and most configs are read."""
    plain = 0
    for name, values in VALUES.items():
        for value in values:
            raw = {**PLAIN, **NEEDED.get(kind, {}), name: value}
            found = plain_config(kind, raw)
            if found is not None:
                plain += 1
                compare(found, kind, raw)
    assert plain > 25


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_writes_needs_it_no_more(tiny: TinyModels, kind: str) -> None:
    """Of the usual RoPE."""
    assert vars(open_checkpoint(str(tiny(kind, eos_token_id=3).path)).config)["model_type"] == kind


def test_an_override_is_transformers_to_know(tiny: TinyModels) -> None:
    found = open_checkpoint(str(tiny("qwen3").path), overrides={"rms_norm_eps": 1e-3}).config
    assert (type(found).__name__, found.rms_norm_eps) == ("Qwen3Config", 1e-3)


def test_a_small_model_starts_without_it(device: str, tmp_path: Path) -> None:
    """Nor does it need the hub's client, nor the compiler; a chat and a caller of the tokenizer
    get transformers."""
    code = f"""
import sys
from reprise import LLM, SamplingParams
llm = LLM(device={device!r}, num_blocks=64)
llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)
heavy = ("transformers", "huggingface_hub", "torch._dynamo", "torch._inductor", "sympy",
         "torch.distributed.tensor", "jinja2", "httpx", "pydantic", "fastapi", "matplotlib")
known = [each for each in heavy if each in sys.modules]
assert known == [] or {device!r} != "cpu", known
llm.chat([{{"role": "user", "content": "1 + 1 ="}}], SamplingParams(max_tokens=2), use_tqdm=False)
import transformers
assert isinstance(llm.get_tokenizer(), transformers.PreTrainedTokenizerFast)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), cwd=tmp_path)

"""Configs that are read without transformers say what transformers reads in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import TinyModels
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from reprise.bench.presets import CONFIGS
from reprise.loading import open_checkpoint
from reprise.loading.draft_head import DEMO_HEAD, Target, read_head
from reprise.loading.hf_config import layer_config
from reprise.loading.plain_config import plain_config
from reprise.loading.rope import resolve_rope
from reprise.models.config_reader import head_size

KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
READ = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps",
    "rope_parameters", "eos_token_id", "tie_word_embeddings", "architectures", "attention_bias",
    "mlp_bias", "sliding_window", "layer_types", "dtype", "quantization_config", "model_type",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers", "use_sliding_window",
)  # fmt: skip
"""Fields that something here reads."""
PLAIN: dict[str, Any] = {
    "architectures": ["A"], "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "eos_token_id": 2,
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None}, "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32, "decoder_sparse_step": 1, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [],
    },
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
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
        LLAMA3, {**LLAMA3, "factor": 32}, {**LLAMA3, "rope_theta": 500000}, {**LLAMA3, "factor": 0},
        {**LLAMA3, "factor": "2"}, {**LLAMA3, "rope_type": "yarn"}, {**LLAMA3, "rope_type": None},
        {**LLAMA3, "original_max_position_embeddings": None}, {**LLAMA3, "beta_fast": 32.0},
        {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
        {name: value for name, value in LLAMA3.items() if not name.startswith("original")},
        {"rope_theta": 10000}, {"rope_theta": True}, {"rope_theta": -1.0}, {"rope_type": ["x"]},
    ],
    "rope_theta": [1e4, 10000, None, True],
    "rope_interleaved": [False, True], "is_llama_config": [True], "use_mrope": [False, True],
    "_name_or_path": ["a/b", None],
    "decoder_sparse_step": [2, 0, None], "moe_intermediate_size": [8, 0],
    "num_experts": [8, 0, None], "num_local_experts": [8], "num_experts_per_tok": [1, None],
    "norm_topk_prob": [False, None], "mlp_only_layers": [[0], [], None, 0, ["0"]],
    "output_router_logits": [False, True], "router_aux_loss_coef": [0.001, 1],
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


@pytest.mark.parametrize("kind", [each for each in KINDS if each != "qwen3_moe"])
def test_what_transformers_writes_needs_it_no_more(tiny: TinyModels, kind: str) -> None:
    """Of the usual RoPE; experts it counts under another name than checkpoints do."""
    assert vars(open_checkpoint(str(tiny(kind, eos_token_id=3).path)).config)["model_type"] == kind


@pytest.mark.parametrize(
    "kind",
    [
        "qwen3-0.6b",
        "qwen3-8b",
        "qwen3-8b-fp8",
        "qwen3-8b-awq",
        "qwen3-30b-a3b",
        "llama-3.2-1b",
        "smollm2-135m",
    ],
)
def test_what_is_published_is_read(kind: str) -> None:
    """In the spelling of transformers 4: RoPE beside ``rope_theta``, its type left out."""
    found = open_checkpoint(str(CONFIGS / kind), config_only=True).config
    assert isinstance(found, SimpleNamespace)
    raw = resolve_rope(given := json.loads((CONFIGS / kind / "config.json").read_text()), given, {})
    raw["quantization_config"] = found.quantization_config
    compare(found, raw.pop("model_type"), raw)


def test_a_published_head_is_read() -> None:
    """Its fields beside the layers' are no fields of theirs."""
    for folder in (DEMO_HEAD, CONFIGS / "heads" / "qwen3-8b-eagle3"):
        file = folder / "config.json"
        given = json.loads(file.read_text())
        target = Target(36, given["hidden_size"], given["vocab_size"])
        assert isinstance(read_head(given, file, target, None).layers, SimpleNamespace)


def test_a_head_has_no_labels_either() -> None:
    """transformers makes a list of them, however many there are."""
    file = CONFIGS / "heads" / "qwen3-8b-eagle3" / "config.json"
    given = {**json.loads(file.read_text()), "num_labels": 5}
    assert layer_config(given, file).num_labels != 5


def test_an_override_is_transformers_to_know(tiny: TinyModels) -> None:
    found = open_checkpoint(str(tiny("qwen3").path), overrides={"rms_norm_eps": 1e-3}).config
    assert (type(found).__name__, found.rms_norm_eps) == ("Qwen3Config", 1e-3)


def test_a_small_model_starts_without_it(device: str, tmp_path: Path) -> None:
    """With drafts of a head neither. Nor does it need the hub's client, nor the compiler; a chat
    and a caller of the tokenizer get transformers."""
    code = f"""
import sys
from reprise import LLM, SamplingParams
drafts = {{"method": "eagle3", "num_speculative_tokens": 2}}
llm = LLM(device={device!r}, num_blocks=64, speculative_config=drafts)
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

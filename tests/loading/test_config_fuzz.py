"""Whatever stands in config.json: the model builds, or a typed error names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers import TinyModels
from hypothesis import example, given, settings

from reprise.errors import RepriseError
from reprise.layers import CausalLM, SelfAttention
from reprise.loading import open_checkpoint
from reprise.platforms import Platform
from reprise.runner.model_choices import (
    build_model,
    choose_cache_dtype,
    choose_dtype,
    choose_model_len,
)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
FIELDS = (
    "architectures", "attention_bias", "dtype", "eos_token_id", "head_dim", "hidden_act",
    "hidden_size", "id2label", "intermediate_size", "layer_types", "max_position_embeddings",
    "max_window_layers", "mlp_bias", "model_type", "no_rope_layer_interval", "no_rope_layers",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "num_labels",
    "original_max_position_embeddings", "partial_rotary_factor", "quantization_config",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "use_sliding_window", "vocab_size",
)  # fmt: skip
ROPE_FIELDS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate",
)  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
}
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**62, 2**63, 10**12, 10**400]),
    st.integers(-4, 300),
    st.floats(),
    st.sampled_from([0.0, 5e-324, 1e-30, 1e30, 1.7e308]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
ABSURD: list[Any] = [10**12, 10**400, 2**31 - 1, float("nan"), float("inf"), -1, 0, True, None,
                     "x", "", [], {}, [[]], [None], {"a": {}}, 1e300]  # fmt: skip


@pytest.fixture(scope="module")
def configs(tiny: TinyModels) -> dict[str, dict[str, Any]]:
    return {
        name: json.loads((tiny(name).path / "config.json").read_text()) for name in ARCHITECTURES
    }


def build(path: Path, config: dict[str, Any], platform: Platform) -> CausalLM:
    """As the runner does it, up to the weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(path), config_only=True)
    dtype = choose_dtype("auto", checkpoint.config, platform)
    length = choose_model_len(None, checkpoint.config)
    if length < 10**10:  # possible, but large tables take long to compute
        length = min(length, 4096)
    return build_model(
        checkpoint.config,
        max_model_len=length,
        table_blocks=256 * -(-length // 16),
        dtype=dtype,
        cache_dtype=choose_cache_dtype("auto", checkpoint.config, platform),
        platform=platform,
    )


def check(path: Path, config: dict[str, Any], field: str, platform: Platform) -> None:
    problem = None
    try:
        model = build(path, config, platform)
    except RepriseError as error:
        problem = str(error)
    if problem is not None:
        # Of two spellings the message has the newer one.
        name = {"rope_scaling": "rope_", "torch_dtype": "dtype"}.get(field, field)
        assert name in problem
        return
    assert all(each.dtype.is_floating_point for each in model.parameters())
    for layer in model.modules():
        if not isinstance(layer, SelfAttention):
            continue
        assert bool(layer.cos_sin[:4].isfinite().all())


FUZZ = settings(max_examples=100)


@FUZZ
@given(st.sampled_from(ARCHITECTURES), st.sampled_from(FIELDS), VALUES)
@example("smollm3", "no_rope_layer_interval", 0)
@example("llama", "num_labels", 10**12)
@example("llama", "architectures", [""])
@example("llama", "model_type", "")
@example("llama", "hidden_size", 2**31 - 1)
@example("qwen3", "head_dim", 2**31 - 2)
def test_any_value_of_any_field(
    configs: dict[str, Any],
    tmp_path: Path,
    platform: Platform,
    architecture: str,
    field: str,
    value: Any,
) -> None:
    check(tmp_path, {**configs[architecture], field: value}, field, platform)


@FUZZ
@given(st.sampled_from(sorted(ROPES)), st.sampled_from(ROPE_FIELDS), VALUES)
@example("yarn", "rope_theta", 1.0)
@example("linear", "factor", 5e-324)
@example("longrope", "original_max_position_embeddings", 1)
def test_any_value_of_any_rope_parameter(
    configs: dict[str, Any],
    tmp_path: Path,
    platform: Platform,
    kind: str,
    field: str,
    value: Any,
) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind], field: value}
    check(tmp_path, {**configs["llama"], "rope_parameters": rope}, field, platform)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("qwen3", FIELDS),
        ("smollm3", ("mlp_bias", "no_rope_layer_interval", "no_rope_layers", "sliding_window")),
        ("mistral", ("layer_types", "sliding_window")),
    ],
)
def test_absurd_values_of_every_field(
    configs: dict[str, Any],
    tmp_path: Path,
    platform: Platform,
    architecture: str,
    fields: tuple[str, ...],
) -> None:
    for field in fields:
        for value in ABSURD:
            check(tmp_path, {**configs[architecture], field: value}, field, platform)


def test_absurd_sizes_together(configs: dict[str, Any], tmp_path: Path, platform: Platform) -> None:
    """Each is possible; all of them are more than any machine has."""
    sizes = {"hidden_size": 2**20, "num_hidden_layers": 100, "intermediate_size": 2**22}
    with pytest.raises(RepriseError, match="hidden_size=1048576") as caught:
        build(tmp_path, {**configs["llama"], **sizes}, platform)
    assert "num_hidden_layers=100" in str(caught.value)


def test_a_config_that_nothing_is_wrong_with(
    configs: dict[str, Any], tmp_path: Path, platform: Platform
) -> None:
    for config in configs.values():
        assert build(tmp_path, config, platform).vocab_size == config["vocab_size"]

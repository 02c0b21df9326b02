"""RoPE from a file and from overrides, in both spellings: one meaning, that of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import (
    CONTEXT,
    TinyModel,
    TinyModels,
    generate,
    greedy,
    make_llm,
    random_ids,
    recorded_logits,
)
from hypothesis import assume, given, settings

from reprise import LLM
from reprise.errors import ConfigError, ModelError
from reprise.loading import open_checkpoint

THETA = 1e6
PLAIN = {"rope_type": "default", "rope_theta": THETA}
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN = {**SCALING, "rope_theta": THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OLD = {"rope_parameters": "drop", "rope_theta": THETA}
"""Fields of a config that transformers 4 wrote."""

CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("theta, old spelling", {}, {"rope_theta": 5e4}, {**PLAIN, "rope_theta": 5e4}),
    (
        "theta, new spelling",
        {},
        {"rope_parameters": {"rope_theta": 5e4}},
        {**PLAIN, "rope_theta": 5e4},
    ),
    ("theta of an old file", OLD, {"rope_theta": 5e4}, {**PLAIN, "rope_theta": 5e4}),
    ("scaling keeps theta", {}, {"rope_parameters": SCALING}, YARN),
    ("old scaling keeps theta", {}, {"rope_scaling": SCALING}, YARN),
    ("scaling of an old file keeps theta", OLD, {"rope_parameters": SCALING}, YARN),
    ("old scaling of an old file", OLD, {"rope_scaling": SCALING}, YARN),
    ("pasted into a new file", {"rope_scaling": SCALING}, {}, YARN),
    ("pasted into an old file", {**OLD, "rope_scaling": SCALING}, {}, YARN),
    (
        "type, oldest spelling",
        {},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {**PLAIN, "rope_type": "linear", "factor": 2.0},
    ),
    (
        "one parameter",
        {"rope_parameters": YARN},
        {"rope_scaling": {"factor": 8.0}},
        {**YARN, "factor": 8.0},
    ),
    (
        "another type drops the parameters",
        {"rope_parameters": LLAMA3},
        {"rope_scaling": SCALING},
        YARN,
    ),
    ("none any more", {"rope_parameters": YARN}, {"rope_scaling": None}, PLAIN),
    ("none any more, new", {"rope_parameters": YARN}, {"rope_parameters": None}, PLAIN),
    ("null in the file", {**OLD, "rope_scaling": None}, {}, PLAIN),
    (
        "all at once",
        {"rope_parameters": LLAMA3},
        {"rope_theta": 5e4, "rope_parameters": SCALING},
        {**YARN, "rope_theta": 5e4},
    ),
    (
        "original outside",
        {**OLD, "original_max_position_embeddings": 64},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        YARN,
    ),
    (
        "original outside, overridden",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 32}},
        {"original_max_position_embeddings": 64},
        YARN,
    ),
    (
        "original outside, overridden inside",
        {"original_max_position_embeddings": 32},
        {"rope_parameters": SCALING},
        YARN,
    ),
]


@pytest.fixture
def copy(tiny: TinyModels, tmp_path: Path) -> Path:
    """A checkpoint that a test may change; its theta is not transformers' default."""
    model = tiny("qwen3", rope_parameters=PLAIN)
    return Path(shutil.copytree(model.path, tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))


@pytest.mark.parametrize(
    ("file", "overrides", "expected"), [pytest.param(*each[1:], id=each[0]) for each in CASES]
)
def test_one_meaning(
    copy: Path, file: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    change(copy, **file)
    config = open_checkpoint(str(copy), overrides=overrides).config
    assert config.rope_parameters == expected


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        pytest.param(*each[1:], id=each[0])
        for each in CASES
        if each[0] in ("theta, old spelling", "old scaling keeps theta", "pasted into a new file")
    ],
)
def test_logits_are_those_of_the_resolved_rope(
    copy: Path,
    device: str,
    tolerance: float,
    file: dict[str, Any],
    overrides: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    change(copy, **file)
    llm = make_llm(copy, device, hf_overrides=overrides)
    check_logits(llm, copy, tolerance, expected, random_ids(1, 100))


def check_logits(
    llm: LLM, path: Path, tolerance: float, rope: dict[str, Any], prompt: list[int]
) -> None:
    """Against transformers with a config that says ``rope`` and nothing else about it."""
    with recorded_logits(llm) as seen:
        (output,) = generate(llm, [prompt], greedy(8))
    change(path, rope_parameters=rope, rope_scaling="drop", rope_theta="drop")
    expected = TinyModel(path).logits([*prompt, *output])[len(prompt) - 1 : -1]
    (found,) = seen.values()
    assert float((torch.stack(found)[:8] - expected).abs().max()) < tolerance


# ---- contexts ----------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_qwen3s_recipe_for_long_contexts(copy: Path, device: str, spelling: str) -> None:
    """As its model card gives it: 131072 tokens of a model with 40960 positions."""
    change(copy, max_position_embeddings=40960)
    recipe = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    overrides = {spelling: recipe}
    options: dict[str, Any] = {"num_blocks": 8193, "max_num_seqs": 2, "load_format": "dummy"}
    for length in (131072, None):
        llm = make_llm(copy, device, hf_overrides=overrides, max_model_len=length, **options)
        assert llm.engine.max_model_len == 131072
    with pytest.raises(ModelError, match="max_model_len=131073 exceeds the 131072 positions"):
        make_llm(copy, device, hf_overrides=overrides, max_model_len=131073, **options)


def test_vllms_example_of_context_extension(copy: Path, device: str) -> None:
    """It puts max_model_len among the overrides."""
    overrides = {"rope_parameters": YARN, "max_model_len": 128}
    assert make_llm(copy, device, hf_overrides=overrides).engine.max_model_len == 128
    with pytest.raises(ConfigError, match="max_model_len=64 and max_model_len=128"):
        make_llm(copy, device, hf_overrides=overrides, max_model_len=64)


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [float(n) for n in range(1, 9)]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}


@pytest.mark.parametrize(
    ("rope", "most", "default"),
    [
        (PLAIN, CONTEXT, CONTEXT),
        (LLAMA3, CONTEXT, CONTEXT),
        (YARN, 256, 256),
        ({"rope_type": "yarn", "factor": 2.0}, 2 * CONTEXT, 2 * CONTEXT),
        ({"rope_type": "linear", "factor": 3.0}, 3 * CONTEXT, 3 * CONTEXT),
        ({"rope_type": "dynamic", "factor": 2.5}, 640, 640),
        (LONGROPE, CONTEXT, 64),
    ],
)
def test_longest_context(
    copy: Path, device: str, rope: dict[str, Any], most: int, default: int
) -> None:
    """vLLM's limits (its _get_and_verify_max_len) and vLLM's defaults."""
    for asked, expected in ((None, default), (most, most)):
        llm = make_llm(copy, device, hf_overrides={"rope_scaling": rope}, max_model_len=asked)
        assert llm.engine.max_model_len == expected
    with pytest.raises(ModelError, match=f"exceeds the {most} positions") as caught:
        make_llm(copy, device, hf_overrides={"rope_scaling": rope}, max_model_len=most + 1)
    assert "hf_overrides={'rope_parameters'" in str(caught.value)


def test_the_remedy_in_the_message_works(copy: Path, device: str) -> None:
    with pytest.raises(ModelError) as caught:
        make_llm(copy, device, max_model_len=1000)
    remedy = str(caught.value).partition("hf_overrides=")[2]
    overrides = json.loads(remedy.replace("'", '"'))
    llm = make_llm(copy, device, hf_overrides=overrides, max_model_len=1000)
    assert llm.engine.max_model_len == 1000


@pytest.mark.parametrize("prompt", [20, 400])
def test_dynamic_is_scaled_for_the_longest_context(
    copy: Path, device: str, tolerance: float, prompt: int
) -> None:
    """transformers' frequencies at the longest sequence, for sequences of every length.

    A linear scaling by 1 with another theta is the same, and transformers computes that.
    """
    rope = {"rope_type": "dynamic", "factor": 2.0}
    llm = make_llm(copy, device, hf_overrides={"rope_scaling": rope})
    factor, width = 2.0, 16
    theta = THETA * (factor * factor - (factor - 1)) ** (width / (width - 2))
    check_logits(llm, copy, tolerance, {**PLAIN, "rope_theta": theta}, random_ids(1, prompt))


@pytest.mark.parametrize(("length", "prompt"), [(64, 40), (None, 40), (256, 100)])
def test_longrope_follows_the_engines_context(
    copy: Path, device: str, tolerance: float, length: int | None, prompt: int
) -> None:
    """Where transformers takes the same factors, which it chooses by the sequence's length."""
    rope = {**LONGROPE, "rope_theta": THETA}
    llm = make_llm(copy, device, hf_overrides={"rope_scaling": rope}, max_model_len=length)
    check_logits(llm, copy, tolerance, rope, random_ids(1, prompt))


def test_longrope_beyond_its_original_context_is_long_for_short_prompts(
    copy: Path, device: str, tolerance: float
) -> None:
    rope = {**LONGROPE, "rope_theta": THETA, "attention_factor": 1.25}
    llm = make_llm(copy, device, hf_overrides={"rope_scaling": rope}, max_model_len=256)
    always_long = {**rope, "short_factor": rope["long_factor"]}
    check_logits(llm, copy, tolerance, always_long, random_ids(1, 10))


def test_the_log_says_what_was_resolved(
    copy: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "reprise"):
        make_llm(copy, device, hf_overrides={"rope_scaling": SCALING})
    (line,) = [each.message for each in caplog.records if each.message.startswith("RoPE")]
    for each in ("yarn", "rope_theta=1000000.0", "factor=4.0", "embeddings=64", "context 256"):
        assert each in line


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"rope_paramters": SCALING}, ["'rope_paramters'", "did you mean 'rope_parameters'"]),
        ({"rope_parameters": {"theta": 1e4}}, ["'theta'", "rope_type='default'", "rope_theta"]),
        ({"rope_scaling": {"factor": 4.0}}, ["'factor'", "rope_type='default'"]),
        ({"rope_scaling": {**SCALING, "beta": 3}}, ["'beta'", "rope_type='yarn'", "beta_fast"]),
        ({"hidden_sizes": 3}, ["'hidden_sizes'", "did you mean 'hidden_size'"]),
        ({"num_labels": 3}, ["'num_labels'"]),
        ({3: 4}, ["3"]),
    ],
)
def test_overrides_that_mean_nothing(
    copy: Path, overrides: dict[Any, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError, match="hf_overrides") as caught:
        open_checkpoint(str(copy), overrides=overrides)
    for each in named:
        assert each in str(caught.value)


@settings(max_examples=50)
@given(st.text(), st.none() | st.integers() | st.text())
def test_any_unknown_key(copy: Path, name: str, value: Any) -> None:
    """At both places where overrides are a mapping."""
    assume(not hasattr(open_checkpoint(str(copy)).config, name))
    for overrides in ({name: value}, {"rope_parameters": {**SCALING, name: value}}):
        with pytest.raises(ConfigError, match="hf_overrides") as caught:
            open_checkpoint(str(copy), overrides=overrides)
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "overrides", "named"),
    [
        ({"rope_theta": 5.0}, {}, ["rope_theta=5.0", "rope_theta=1000000.0", "contradict"]),
        (
            {},
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            ["rope_theta=5.0", "rope_theta=6.0", "contradict"],
        ),
        (
            {"rope_parameters": YARN, "original_max_position_embeddings": 32},
            {},
            ["original_max_position_embeddings=32", "original_max_position_embeddings=64"],
        ),
        ({"rope_scaling": "yarn"}, {}, ["config.json", "rope_scaling='yarn'"]),
        ({}, {"rope_parameters": [1]}, ["hf_overrides", "rope_parameters=[1]"]),
    ],
)
def test_sources_that_contradict_themselves(
    copy: Path, file: dict[str, Any], overrides: dict[str, Any], named: list[str]
) -> None:
    change(copy, **file)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(copy), overrides=overrides)
    for each in named:
        assert each in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, "x", True, 10**400])
@pytest.mark.parametrize("field", ["rope_theta", "factor", "rms_norm_eps"])
def test_numbers_that_are_none(copy: Path, device: str, field: str, value: Any) -> None:
    if field == "rms_norm_eps":
        change(copy, rms_norm_eps=2.0 if value == 0.0 else value)  # 0 can be computed
    else:
        change(copy, rope_parameters={**YARN, field: value})
    with pytest.raises(ModelError, match=field):
        make_llm(copy, device)

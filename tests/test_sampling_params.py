from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from reprise.errors import RequestError
from reprise.sampling_params import SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens) == (16, 0)
    assert params.stop_strings == ()
    assert params.stop_token_ids == ()
    assert not params.greedy


@pytest.mark.parametrize(
    "values",
    [
        {"n": 3},
        {"temperature": 0},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 50},
        {"top_p": 1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.5},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {0: -100, 7: 100.0}},
        {"seed": 0},
        {"seed": -(2**63)},
        {"max_tokens": None, "min_tokens": 100},
        {"max_tokens": 4, "min_tokens": 4},
        {"stop": "END"},
        {"stop": ["a", "b"], "stop_token_ids": [1, 2]},
        {"stop": [], "detokenize": False},
        {"logprobs": 0, "prompt_logprobs": 20},
    ],
)
def test_valid(values: dict[str, Any]) -> None:
    SamplingParams(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", [5]),
        ("seed", 1.5),
        ("seed", 2**63),
        ("seed", False),
        ("max_tokens", 0),
        ("max_tokens", "16"),
        ("min_tokens", -1),
        ("min_tokens", None),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [2**40]),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 2.0),
        ("ignore_eos", 1),
        ("detokenize", None),
        ("skip_special_tokens", "no"),
        ("include_stop_str_in_output", 0),
    ],
)
def test_invalid_names_field_value_and_remedy(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(name)
    given = value if not isinstance(value, dict) else next(iter(value))
    assert str(given)[:30] in str(error.value)
    assert ": " in str(error.value)


@pytest.mark.parametrize(
    ("values", "culprit", "other"),
    [
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens=4", "max_tokens=3"),
        ({"stop": "END", "detokenize": False}, "stop='END'", "detokenize=True"),
    ],
)
def test_conflicts(values: dict[str, Any], culprit: str, other: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**values)
    assert culprit in str(error.value)
    assert other in str(error.value)


def test_negative_one_logprobs_says_that_it_is_not_supported() -> None:
    with pytest.raises(RequestError, match="vocabulary is not supported"):
        SamplingParams(logprobs=-1)


def test_one_form_for_equivalent_values() -> None:
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert isinstance(SamplingParams(temperature=1).temperature, float)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (0.01, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_immutable_and_independent_of_what_was_given() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 100.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert replace(params, n=2, stop="x").stop_strings == ("x",)
    with pytest.raises(RequestError):
        replace(params, n=0)

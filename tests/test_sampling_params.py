from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ODD
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.errors import RequestError
from reprise.sampling_params import RequestOutputKind, SamplingParams
from reprise.structured_outputs import StructuredOutputsParams


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
        {"logprobs": -1, "prompt_logprobs": -1},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
        {"allowed_token_ids": [3], "bad_words": ["a", "a b"], "truncate_prompt_tokens": -1},
        {"output_kind": RequestOutputKind.DELTA, "skip_reading_prefix_cache": True},
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
        ("min_tokens", 2**63),
        ("max_tokens", 2**63),
        ("top_k", 2**70),
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
        ("logprobs", -2),
        ("logprobs", True),
        ("prompt_logprobs", -2),
        ("prompt_logprobs", 2.0),
        ("ignore_eos", 1),
        ("detokenize", None),
        ("skip_special_tokens", "no"),
        ("include_stop_str_in_output", 0),
        # Zero, infinite or no number for the device, which computes in float32.
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e39),
        ("temperature", 1e39),
        ("top_p", 1e-46),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.5]),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", "12"),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [3]),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("skip_reading_prefix_cache", 1),
        ("output_kind", 1),
        ("output_kind", None),
        ("stop_token_ids", np.array([1.5])),
        ("max_tokens", np.float64(3)),
        ("temperature", np.array([0.5])),
    ],
)
def test_invalid_names_field_value_and_remedy(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(name)
    given = value if not isinstance(value, dict) else next(iter(value))
    assert str(given)[:30] in str(error.value)
    assert ": " in str(error.value)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_half_a_surrogate_pair_is_no_text(name: str) -> None:
    """No output has one, so it would ask for nothing."""
    with pytest.raises(RequestError, match=f"{name}=.*is not valid text"):
        SamplingParams(**{name: ["a", "b\udfff"]})


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


def test_one_form_for_equivalent_values() -> None:
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert isinstance(SamplingParams(temperature=1).temperature, float)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (0.01, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_fields_may_change_and_are_validated_when_submitted() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 100.0
    assert params.logit_bias == {1: 2.0}
    params.stop, params.stop_token_ids, params.n = "END", [np.int64(7)], 2
    assert params.stop_strings == ("END",)
    taken = params.snapshot()
    assert (taken.stop, taken.stop_token_ids, taken.n) == ("END", (7,), 2)
    params.n = 3
    assert taken.n == 2
    params.temperature = -1
    with pytest.raises(RequestError, match="temperature=-1"):
        params.snapshot()
    del params.temperature
    assert params.snapshot().temperature == 1.0
    with pytest.raises(RequestError):
        replace(taken, n=0)


def test_clone_shares_nothing() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop=["a"])
    clone = params.clone()
    assert clone == params
    assert clone.logit_bias is not None
    clone.logit_bias[1] = 5.0  # type: ignore[index]
    assert params.logit_bias == {1: 2.0}
    assert pickle.loads(pickle.dumps(params)) == params


class Number(int):
    pass


class Text(str):
    pass


class Own(SamplingParams):
    pass


class OwnWanted(StructuredOutputsParams):
    pass


def test_what_is_submitted_has_no_class_of_the_caller() -> None:
    """Ranks and replicas, which get it pickled, could not read it."""
    params = Own(
        n=Number(2), seed=Number(3), stop=Text("a"), bad_words=[Text("b")],
        stop_token_ids=[Number(4)], logit_bias={Number(5): Number(1)},
        structured_outputs=OwnWanted(regex=Text("c")),
    )  # fmt: skip
    vars(params)["own"] = Own
    taken = params.snapshot()
    assert __name__.encode() not in pickle.dumps(taken)
    assert taken == SamplingParams(
        n=2, seed=3, stop="a", bad_words=["b"], stop_token_ids=[4], logit_bias={5: 1},
        structured_outputs=StructuredOutputsParams(regex="c"),
    )  # fmt: skip


def test_from_optional_takes_what_json_has() -> None:
    nothing = {each.name: None for each in fields(SamplingParams)}
    assert SamplingParams.from_optional(**nothing) == SamplingParams()
    params = SamplingParams.from_optional(logit_bias={"17": -3}, temperature=None, max_tokens=4)
    assert params == SamplingParams(logit_bias={17: -3.0}, max_tokens=4)
    for key in ("x", "-1", "1.0", "²", "9" * 5000):
        with pytest.raises(RequestError, match="logit_bias"):
            SamplingParams.from_optional(logit_bias={key: 1})


@pytest.mark.parametrize("set_later", [False, True])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("logprob", "logprobs")],
)
def test_unknown_names_are_named(name: str, meant: str, set_later: bool) -> None:
    def give() -> None:
        if set_later:
            setattr(SamplingParams(), name, 1)
        else:
            SamplingParams(**{name: 1})

    with pytest.raises(RequestError, match=rf"{name} \(did you mean {meant}\?\)"):
        give()


class Secretive:
    def __repr__(self) -> str:
        raise RuntimeError("not even for an error's message")


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], {10**5000: 1}, Secretive(), [Secretive()]], ids=range(5)
)
@pytest.mark.parametrize("name", ["n", "min_tokens", "seed", "temperature", "stop_token_ids"])
def test_what_cannot_be_shown_is_refused_by_name(name: str, value: Any) -> None:
    """Python writes no whole number of more than 4300 digits."""
    with pytest.raises(RequestError, match=f"{name}=<{type(value).__name__} that cannot be shown>"):
        SamplingParams(**{name: value})


def test_values_without_a_name_are_refused() -> None:
    """The order of the fields is not vLLM's, so they would silently mean something else."""
    with pytest.raises(RequestError, match=r"SamplingParams\(1, 0.5\)"):
        SamplingParams(1, 0.5)  # type: ignore[misc]


NUMBERS: dict[str, Any] = {
    "n": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": 9,
    "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "max_tokens": 9, "min_tokens": 1, "logprobs": 2, "prompt_logprobs": 3,
    "truncate_prompt_tokens": 4, "ignore_eos": True, "detokenize": False,
    "stop_token_ids": [1, 2], "allowed_token_ids": [3, 4], "logit_bias": {5: 1.5},
}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda value: np.array(value)[()],
        np.array,
        torch.tensor,
        lambda value: [np.int64(each) for each in value] if isinstance(value, list) else value,
    ],
    ids=["scalars", "arrays", "tensors", "lists of scalars"],
)
def test_numbers_of_other_makes(make: Any) -> None:
    given = {name: make(value) for name, value in NUMBERS.items() if name != "logit_bias"}
    given["logit_bias"] = {np.int64(5): np.float32(1.5)}
    params = SamplingParams(**given)
    assert params == SamplingParams(**NUMBERS)
    for value in asdict(params).values():
        for each in value if isinstance(value, tuple) else (value,):
            assert type(each) in (int, float, bool, str, dict, type(None), RequestOutputKind)


NAMES = [each.name for each in fields(SamplingParams)]


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except RequestError as error:
        return str(error)
    return None


@settings(max_examples=500)
@given(
    st.dictionaries(
        st.sampled_from([each.name for each in fields(SamplingParams)]), st.sampled_from(ODD)
    )
)
def test_any_value_is_accepted_or_refused_by_name(values: dict[str, Any]) -> None:
    """Whether given at once or later; what was accepted once is accepted again."""
    later = SamplingParams()
    for name, value in values.items():
        setattr(later, name, value)
    message = refusal(lambda: SamplingParams(**values))
    assert refusal(later.snapshot) == message
    if message is None:
        params = SamplingParams(**values)
        assert later.snapshot() == params == params.snapshot() == params.clone()
    else:
        assert message.partition("=")[0] in values

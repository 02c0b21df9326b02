"""Sampling values of requests that leave them out, and what a server's operator says of them."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from reprise.sampling_params import SamplingParams
from reprise.server import fields
from reprise.server.client import EngineClient
from reprise.server.errors import ApiError
from reprise.server.fields import ChatRequest, CompletionRequest, sampling
from reprise.server.logprobs import fewer
from reprise.server.options import ServerOptions
from reprise.server.state import ServerState


def _defaults(
    override: dict[str, Any], kind: Literal["auto", "vllm"] = "auto", **recommended: Any
) -> dict[str, Any]:
    """Of a server whose operator says ``override``."""
    client = EngineClient()
    client.facts = {"recommended": recommended}
    options = ServerOptions(override_generation_config=override, generation_config=kind)
    return ServerState(options, client).sampling_defaults()


def test_the_operators_temperature_counts_more_than_the_checkpoints_do_sample() -> None:
    greedy = {"temperature": 0.6, "do_sample": False}
    assert _defaults({}, **greedy) == {"temperature": 0.0}
    assert _defaults({"temperature": 0.7}, **greedy) == {"temperature": 0.7}
    assert _defaults({"top_k": 3}, **greedy) == {"temperature": 0.0, "top_k": 3}
    assert _defaults({"temperature": 0.7, "do_sample": False}) == {"temperature": 0.0}


def test_the_operators_max_new_tokens_is_a_limit_as_with_vllm() -> None:
    limited = _defaults({"max_new_tokens": 9}, max_new_tokens=50)
    for asked, wanted in ((None, 9), (100, 9), (3, 3)):
        request = ChatRequest(messages=[{"role": "user"}], max_tokens=asked)
        assert sampling(request, limited)["max_tokens"] == wanted
    assert sampling(CompletionRequest(prompt="x"), limited)["max_tokens"] == 9
    # What the checkpoint recommends, requests may exceed.
    request = ChatRequest(messages=[{"role": "user"}], max_tokens=100)
    assert sampling(request, _defaults({}, max_new_tokens=50))["max_tokens"] == 100


def test_fewer_of_the_likeliest() -> None:
    chosen, first, second = [5, -3.0, "c", None], [7, -1.0, "a", None], [8, -2.0, "b", None]
    position = [chosen, first, second]
    assert fewer([None, position], 0) == [None, [chosen]]
    assert fewer([position], 1) == [[chosen, first]]
    assert fewer([position], 2) == [[chosen, first, second]]
    assert fewer([[first, second]], 1) == [[first]]


def test_equal_parameters_are_checked_once_and_invalid_ones_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []

    def noted(**given: Any) -> SamplingParams:
        made.append(given)
        return SamplingParams(**given)

    monkeypatch.setattr(fields, "SamplingParams", noted)
    monkeypatch.setattr(fields, "_checked", None)
    right = CompletionRequest(prompt="x", temperature=0.5)
    for _ in range(3):
        assert sampling(right, {}) == {"temperature": 0.5}
    assert len(made) == 1
    for _ in range(2):
        with pytest.raises(ApiError):
            sampling(CompletionRequest(prompt="x", min_tokens=5, max_tokens=2), {})
    assert len(made) == 3
    for choice in ("a", "b"):
        asked = CompletionRequest(prompt="x", structured_outputs={"choice": [choice]})
        sampling(asked, {})
    assert len(made) == 5

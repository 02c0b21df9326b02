"""Sampling values of requests that leave them out, and what a server's operator says of them."""

from __future__ import annotations

from typing import Any, Literal

from reprise.server.client import EngineClient
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

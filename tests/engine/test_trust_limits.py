"""What docs/graphs.md says that trust by kind cannot see: it goes past start-up and past first
steps of a kind, and ``canary:1`` sees it. Who makes trust finer finds here what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from planted import planted, wrong_tokens
from torch import Tensor

from reprise import LLM
from reprise.testing.faults.planted import tokens_of
from reprise.testing.faults.steps import WrongWhere

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 8, "num_blocks": 300,
    "max_model_len": 120, "graph_buckets": "decode=1,2,4,8,16;mixed=64",
}  # fmt: skip


class OneGraph(WrongWhere):
    """Between the anchors: rows are proven on the smallest, a middle and the largest graph."""

    name = "one_graph"
    summary = "of the graphs of a family one that is no anchor is wrong, for some requests"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        end = tokens.begin + tokens.new
        return (end > 16) & (end <= 64) & torch.full_like(tokens.live, len(tokens.live) == 2)


class OneNumber(WrongWhere):
    name = "one_number"
    summary = "steps of five requests, padded to eight, are wrong; those of six are right"

    def where(self, named: dict[str, Any]) -> Tensor:
        live = tokens_of(named).live
        return (live.sum() == 5) & torch.full_like(live, len(live) == 8)


class OneLength(WrongWhere):
    name = "one_length"
    summary = "contexts of 41 to 47 tokens are wrong, in the midst of a class"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens = tokens_of(named)
        end = tokens.begin + tokens.new
        return (end > 40) & (end < 48)


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def serve(llm: LLM) -> list[list[int]]:
    prompts = [random_ids(200 + n, 5 + 3 * n) for n in range(7)]
    return [each for count in (5, 2) for each in generate(llm, prompts[:count], greedy(26))]


@pytest.fixture(scope="module")
def expected(model: TinyModel, device: str) -> list[list[int]]:
    return serve(make_llm(model, device, **OPTIONS))


@pytest.mark.parametrize("fault", [OneGraph, OneNumber, OneLength])
def test_only_canary_1_sees(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    fault: type[WrongWhere],
) -> None:  # fmt: skip
    wrong = {}
    for verify in ("startup", "canary:1"):
        with planted(monkeypatch, fault, "paged_attention"):
            llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify=verify)
        if verify == "startup":
            assert not llm.graph_report().quarantined
        wrong[verify] = wrong_tokens(serve(llm), expected)
        if verify == "canary:1":
            assert llm.graph_report().canary_failures
    assert wrong["startup"], "start-up and first steps miss it"
    assert wrong["canary:1"] == 0

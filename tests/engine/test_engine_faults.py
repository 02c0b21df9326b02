"""Broken ops under real models: caught before a wrong token leaves the engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import TinyModels, greedy, make_llm, random_ids

from reprise import LLM, platforms
from reprise.ops import OpTable
from reprise.ops.registry import all_ops
from reprise.platforms import Platform
from reprise.runner import model_runner
from reprise.testing import faults

LIMIT = 4096
"""The wrong extent is right up to here."""


@contextlib.contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> Iterator[None]:
    """Engines made in this block have the fault in their ops."""
    with contextlib.ExitStack() as stack:

        class BrokenTable(OpTable):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                stack.enter_context(faults.inject(name, self, op))

        monkeypatch.setattr(model_runner, "OpTable", BrokenTable)
        yield
        monkeypatch.undo()


def tokens(llm: LLM, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    inputs = [{"prompt_token_ids": each} for each in prompts]
    outputs = llm.generate(inputs, greedy(count), use_tqdm=False)
    return [each.outputs[0].token_ids for each in outputs]


def exists(name: str, op: str, executor: str) -> bool:
    platform = platforms.resolve("cpu")
    return faults.FAULTS[name].inexpressible(all_ops()[op], executor, platform) is None


@pytest.mark.covering(2, where=exists)
@pytest.mark.parametrize("executor", ["full", "breakable"])
@pytest.mark.parametrize("op", ["paged_attention", "rotary_cache"])
@pytest.mark.parametrize("name", sorted(faults.RECORDED))
def test_no_wrong_token_leaves(
    tiny: TinyModels,
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    op: str,
    executor: str,
) -> None:
    reason = faults.FAULTS[name].inexpressible(all_ops()[op], executor, platform)
    if reason is not None:
        pytest.skip(reason)
    model = tiny("qwen3")
    prompts = [random_ids(21, 5), random_ids(22, 90), random_ids(23, 40)]
    small: dict[str, Any] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 32, "graph_buckets": "decode=4;mixed=32",
    }  # fmt: skip
    expected = tokens(make_llm(model, platform.name, **small), prompts)
    with broken(monkeypatch, name, op), caplog.at_level(logging.WARNING):
        llm = make_llm(model, platform.name, **small, graph_mode=executor, graph_verify="canary:1")
        assert tokens(llm, prompts) == expected
    report = llm.graph_report()
    refused = [each for each in report.graphs if each.quarantined]
    assert refused, "the fault was caught"
    told = " ".join(each.message for each in caplog.records)
    assert op in told, "the log names the op"


def test_an_extent_that_is_wrong_past_4k_is_caught_at_start_up(
    tiny: TinyModels, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3", max_position_embeddings=LIMIT + 512)
    options: dict[str, Any] = {
        "num_blocks": 640, "max_num_seqs": 2, "max_num_batched_tokens": 1024,
        "graph_buckets": "decode=1,2;mixed=1024",
    }  # fmt: skip
    prompts = [random_ids(31, LIMIT + 40), random_ids(32, 7)]
    expected = tokens(make_llm(model, platform.name, **options), prompts)
    monkeypatch.setattr(faults.WrongExtent, "limit", LIMIT)
    with broken(monkeypatch, "wrong_extent", "paged_attention"):
        monkeypatch.setattr(faults.WrongExtent, "limit", LIMIT)
        llm = make_llm(model, platform.name, **options, graph_mode="full")
    full = [each for each in llm.graph_report().graphs if each.planned == "full"]
    assert len(full) == 3
    assert all(each.quarantined and "paged_attention" in each.quarantined for each in full)
    assert tokens(llm, prompts) == expected

"""What drafts is looked at like the target: its memory, its graphs, its faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import TinyModels, make_llm
from next_tokens import with_layer

from reprise import LLM
from reprise.config import EngineConfig
from reprise.doctor.graphs import measure
from reprise.doctor.graphs.page import render
from reprise.doctor.memory import memory_report
from reprise.graphs import Buckets

SMALL: dict[str, Any] = {
    "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 8, "max_model_len": 96,
    "num_blocks": 65, "graph_mode": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def options(tiny: TinyModels, device: str) -> dict[str, Any]:
    draft = tiny("llama", seed=4, num_hidden_layers=1)
    config = {"method": "draft_model", "model": str(draft.path), "num_speculative_tokens": 3}
    return {**SMALL, "device": device, "speculative_config": config}


@pytest.fixture(scope="module")
def llm(tiny: TinyModels, options: dict[str, Any]) -> LLM:
    return make_llm(tiny("qwen3"), **options)


def test_memory_is_that_of_the_engine(tiny: TinyModels, options: dict[str, Any], llm: LLM) -> None:
    report = memory_report(EngineConfig(model=str(tiny("qwen3").path), **options))
    runner = llm.engine.runner
    assert runner.drafter is not None
    models = runner.model, runner.drafter.draft  # type: ignore[attr-defined]
    assert report.weights_bytes == sum(e.nbytes for each in models for e in each.parameters())
    memory = runner.drafter.memory().values()
    assert report.buffers["drafter"] == sum(each.nbytes for each in memory)
    layout = runner.cache_layout.pools[0]
    assert sum(each.block_bytes for each in report.caches) == layout.block_bytes


@pytest.mark.parametrize("kind", ["states", "windows"])
def test_cache_is_that_of_the_engine(
    tiny: TinyModels, tmp_path: Path, device: str, kind: str
) -> None:
    """States keep what drafts change; windows keep what a draft model writes ahead."""
    if kind == "states":
        model, _ = with_layer(tmp_path / "model", tiny("qwen3_5"), "qwen3_5")
        draft = {"method": "mtp"}
    else:
        model = tiny("qwen3", use_sliding_window=True, sliding_window=24, max_window_layers=1)
        draft = {"method": "draft_model", "model": str(model.path)}
    config = {**draft, "num_speculative_tokens": 3}
    options = {**SMALL, "device": device, "speculative_config": config, "dtype": "float32"}
    report = memory_report(EngineConfig(model=str(model.path), **options))
    layout = make_llm(model, **options).engine.runner.cache_layout
    assert [each.block_bytes for each in report.pools] == [e.block_bytes for e in layout.pools]
    for each in report.capacities:
        needs = (layout.most(pool, each.tokens) for pool in range(len(layout.pools)))
        nbytes = sum(n * e.block_bytes for n, e in zip(needs, layout.pools, strict=True))
        assert each.request_bytes == nbytes


def test_graphs_have_a_row_for_each_owner(llm: LLM) -> None:
    matrix = measure(
        llm.engine.runner, {}, executors=("none", "full"), buckets=Buckets((2,), (16,)),
        contexts=(24,),
    )  # fmt: skip
    assert matrix.rows("decode") == ["none", "full", "draft chain, none", "draft chain, full"]
    assert matrix.rows("mixed") == ["none", "full", "draft prefill, none", "draft prefill, full"]
    assert matrix.ok
    assert len(matrix.graphs) == 4
    assert {each.executor for each in matrix.proofs if each.probes} == {
        "full", "draft chain, full", "draft prefill, full",
    }  # fmt: skip
    page = render(matrix)
    assert "draft chain, eager" in page


def test_a_fault_shows_where_it_is(llm: LLM) -> None:
    matrix = measure(
        llm.engine.runner, {}, executors=("full",), buckets=Buckets((2,), (16,)), contexts=(24,),
        fault=("unwritten_output", "paged_attention"),
    )  # fmt: skip
    assert {each.executor for each in matrix.bad} == {
        "full",
        "draft prefill, full",
        "draft chain, full",
    }
    for each in matrix.bad:
        assert each.where is not None
        assert each.where.op == "paged_attention"
        assert each.where.layer == 0


def test_memory_of_a_head_is_told_without_reading_it(device: str) -> None:
    """What it has in common with the target is there once."""
    options = {**SMALL, "speculative_config": {"method": "eagle3", "num_speculative_tokens": 3}}
    report = memory_report(EngineConfig(device=device, **options))
    heads = {each.name for each in report.weights if each.name.startswith("draft ")}
    assert "draft head.fc.weight" in heads
    assert not any("embed_tokens" in each for each in heads)
    (caches,) = report.caches
    assert caches.layers == 7

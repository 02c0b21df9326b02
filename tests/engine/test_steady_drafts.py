"""Decoding with drafts, once it goes on: graphs compute every step, and the host does little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_heads import of_few_words, write_head
from helpers import (
    TinyModel,
    TinyModels,
    greedy,
    make_llm,
    python_calls_of_a_step,
    random_ids,
)

from reprise import LLM
from reprise.graphs import prove
from reprise.graphs.segments import SegmentedGraph
from reprise.runner.kinds import CONTEXTS, class_bounds, context_class


@pytest.fixture(scope="module")
def target(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    root = tmp_path_factory.mktemp("target")
    return of_few_words(tiny("qwen3", num_hidden_layers=4), root / "model")


@pytest.fixture
def drafting(
    target: TinyModel, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., LLM]:
    head: Path = write_head(
        tmp_path_factory.mktemp("head") / "head", target, imitates=True, norm_before_residual=True
    )

    def make(method: str, **options: Any) -> LLM:
        model = head if method == "eagle3" else target.path
        config = {"method": method, "model": str(model), "num_speculative_tokens": 3}
        return make_llm(
            target, device, speculative_config=config, graph_verify="startup",
            graph_mode="decode=full,mixed=none", max_model_len=256, **options,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_start_up_proves_what_a_request_alone_meets(
    drafting: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """However many drafts count: no step runs eagerly, and behind the first tokens none is
    compared. Where start-up has time for its probes."""
    if device == "sim":
        pytest.skip("its comparisons take too long")
    monkeypatch.setattr(prove, "VERIFY_SECONDS", 1000.0)
    llm = drafting(method, max_num_seqs=2, graph_buckets="decode=1,2", num_blocks=65)
    report = llm.graph_report()
    assert all(each.probes == each.planned_probes for each in report.graphs)
    counted: set[int] = set()
    met: list[str] = []
    for runner in (each for _, each in llm.engine.runner.owners):
        meet = runner.canary.met
        monkeypatch.setattr(
            runner.canary, "met", lambda bucket, s, meet=meet: (met.append(""), meet(bucket, s))
        )
    engine = llm.engine
    group = engine.add("0", random_ids(1, 20), greedy(200, ignore_eos=True))
    done = 0
    while engine.has_work:
        engine.step()
        counted.add(group.completions[0].request.num_output_tokens - done)
        done = group.completions[0].request.num_output_tokens
    assert counted >= {1, 4}, "none and all of the drafts count now and then"
    assert met == []
    graphs = llm.graph_report().graphs
    assert [each.name for each in graphs if each.eager_steps] == []
    assert {each.owner for each in graphs if each.replays} >= {"", "draft chain"}


@pytest.mark.parametrize(("requests", "most"), [(1, 225), (16, 260)])
def test_calls_of_a_steady_step(
    drafting: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch,
    requests: int, most: int,
) -> None:  # fmt: skip
    """The host's work of a step whose target, prefill and chain graphs compute."""
    if device == "sim":
        pytest.skip("its kernels are launched in Python")
    if device != "cpu":
        most += 150  # Triton launches what surrounds the graphs: 395 and 497 on an H100
    llm = drafting("eagle3", max_num_seqs=16, graph_buckets=f"decode={requests}", num_blocks=513)
    monkeypatch.setattr(SegmentedGraph, "replay", lambda self: None)
    for _, owner in llm.engine.runner.owners:
        monkeypatch.setattr(owner.ledger, "_holds", lambda *asked: True)
    assert python_calls_of_a_step(llm, requests, 200, 20, 20) <= most


@pytest.mark.parametrize("new", [1, 2, 8, 16])
def test_bounds_of_a_class_are_where_it_ends(new: int) -> None:
    starts = np.arange(1, 5000)
    low, high = class_bounds(starts, np.full_like(starts, new))
    classes = context_class(starts + new)
    assert ((low <= starts) & (starts <= high)).all()
    assert (context_class(low + new) == classes).all()
    assert (context_class(high + new) == classes).all()
    assert ((low == 1) | (context_class(low - 1 + new) < classes)).all()
    last = classes == CONTEXTS - 1
    assert (last | (context_class(high + 1 + new) > classes)).all()

"""What counts as proven, although no comparison could have shown it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from planted import OPTIONS, planted
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise.graphs.compare import poison
from reprise.ops.registry import Op, OpTable
from reprise.runner.probes import ProbeMaker
from reprise.testing.faults import FAULTS
from reprise.testing.faults.base import BrokenInGraphs
from reprise.testing.faults.planted import last_slots, tokens_of
from reprise.testing.faults.steps import WrongWhere


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


class UnwrittenValues(BrokenInGraphs):
    name = "unwritten_values"
    summary = "once it is active the graph leaves the values of its tokens as they are in the cache"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.active = torch.zeros((), dtype=torch.bool, device=table.platform.device)

    def broken(self, named: dict[str, Any]) -> Any:
        rows, slots = named["value_cache"].flatten(0, 1), last_slots(named)
        if rows.itemsize == 1:
            rows = rows.view(torch.uint8)
        before = rows[slots]
        result = self.proceed(named)
        rows[slots] = torch.where(self.active, before, rows[slots])
        return result


DRAFTS = {"method": "draft_model", "num_speculative_tokens": 3}


@pytest.mark.parametrize("first", ["eager execution", "the replay"])
@pytest.mark.parametrize("what", ["keys and values", "codes", "drafts"])
def test_rows_that_are_there_already(
    model: TinyModel, device: str, monkeypatch: Any, what: str, first: str
) -> None:
    """As behind a request of the same prompt in the same blocks."""
    options: dict[str, Any] = {"graph_buckets": "decode=2;mixed=16", "graph_mode": "full"}
    if what == "codes":
        options["kv_cache_dtype"] = "fp8"
    if what == "drafts":
        options["speculative_config"] = {**DRAFTS, "model": str(model.path)}
    with planted(monkeypatch, UnwrittenValues, "rotary_cache") as found:
        llm = make_llm(model, device, **{**OPTIONS, **options})
    owners = list(llm.engine.runner.owners)
    found[0].active.fill_(True)
    for _, graphs in owners:
        for bucket in list(graphs.bucket_graphs.values()):
            computation, probe = graphs.computation, bucket.probes[0]
            with torch.inference_mode(), computation.ops.computing():
                probe.fill()
                computation.forward(bucket.shape, computation.model)
                verdict = graphs.judge.compare(bucket, probe, behind=first == "the replay")
            wrong = {each.tensor for each in verdict.differences}
            assert any(each.endswith("value") for each in wrong), (bucket.info.name, wrong)


def test_what_is_no_draft_was_written_by_the_graph() -> None:
    drafts = torch.zeros(4, dtype=torch.int64)
    poison([drafts])
    assert (drafts < -1).all()


class RowsMoved(WrongWhere):
    """The values of tokens are alike where the tokens are: nothing shows then."""

    name = "rows_moved"
    summary = "in a fresh prompt that is alone each token has the attention of the one before"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        tokens = tokens_of(named)
        alone = (tokens.begin == 0).all() & tokens.live.all() & (tokens.new == len(tokens.new))
        out = named["out"]
        out.copy_(torch.where((alone.all() & self.active).view(1, 1, 1), out.roll(1, 0), out))
        return result

    def where(self, named: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def test_tokens_that_are_alike_prove_nothing_but_their_experts(
    tiny: TinyModels, device: str, monkeypatch: Any
) -> None:
    """Where start-up has no time for more than the probes that no graph goes without."""
    probes = ProbeMaker.probes

    def few(*args: Any) -> Any:
        found = probes(*args)
        return [each for number, each in enumerate(found) if not number or each.always]

    monkeypatch.setattr(ProbeMaker, "probes", few)
    sparse, prompt = tiny("qwen3_moe"), random_ids(401, 16)
    options = {**OPTIONS, "dtype": "bfloat16"}  # which rounds means of equal numbers to them
    expected = generate(make_llm(sparse, device, **options), [prompt], greedy(3))
    options |= {"graph_buckets": "mixed=16", "graph_mode": "decode=none,mixed=full"}
    with planted(monkeypatch, RowsMoved, "paged_attention"):
        llm = make_llm(sparse, device, graph_verify="startup", **options)
    assert not llm.graph_report().quarantined
    assert generate(llm, [prompt], greedy(3)) == expected
    assert llm.graph_report().quarantined


def test_no_two_blocks_are_alike_whose_numbers_differ_in_one_bit(
    model: TinyModel, device: str
) -> None:
    """A kernel whose addresses wrap, or whose block numbers do, reads such a one."""
    llm = make_llm(model, device, **{**OPTIONS, "num_blocks": 300})
    forward = llm.engine.runner.forward_pass
    tables = [torch.arange(1, 300, dtype=torch.int32).numpy().reshape(1, -1)]
    assert forward._probes is not None
    with torch.inference_mode():
        forward._probes._content.fill(tables)
    for pool in forward.found_caches()[0]:
        for name, each in pool.items():
            rows = each.tensor.flatten(1).float()
            for bit in range(9):
                other = torch.arange(len(rows)) ^ (1 << bit)
                there = (other < len(rows)) & (other > 0)
                there[0] = False
                same = (rows[there] == rows[other[there].to(rows.device)]).all(dim=1)
                assert not same.any(), (name, bit)


def test_what_zeros_have_hidden_is_proven_once_they_are_none(
    model: TinyModel, device: str, monkeypatch: Any, tmp_path: Path
) -> None:
    """Whatever attention gives is multiplied by them. The first step behind the update, which is
    compared in any case, is right."""
    shutil.copytree(model.path, tmp_path, dirs_exist_ok=True)
    later = load_file(tmp_path / "model.safetensors")
    hidden = {name: torch.zeros_like(each) for name, each in later.items() if "o_proj" in name}
    save_file({**later, **hidden}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = {**OPTIONS, "graph_buckets": "decode=4", "graph_mode": "decode=full,mixed=none"}
    with planted(monkeypatch, FAULTS["wrong_three_of_four"], "paged_attention"):
        llm = make_llm(tmp_path, device, graph_verify="startup", **options)
    (graph,) = llm.graph_report().graphs
    assert graph.verified
    llm.update_weights(later)
    assert not graph.verified
    prompts = [random_ids(300 + number, 9) for number in range(4)]
    right = make_llm(model, device, **OPTIONS)
    for count in (4, 3):
        some, tokens = prompts[:count], greedy(5)
        assert generate(llm, some, tokens) == generate(right, some, tokens)
    assert llm.graph_report().quarantined


def test_what_was_proven_anew_is_verified_again(model: TinyModel, device: str) -> None:
    """While nothing runs, all of it; an update that hides nothing costs no proof."""
    options = {**OPTIONS, "graph_buckets": "decode=4", "graph_mode": "decode=full,mixed=none"}
    llm = make_llm(model, device, graph_verify="startup", **options)
    (graph,) = llm.graph_report().graphs
    weights = load_file(model.path / "model.safetensors")
    name = next(each for each in weights if "o_proj" in each)
    llm.update_weights({name: torch.zeros_like(weights[name])})
    assert graph.verified
    llm.update_weights({name: weights[name]})
    assert (graph.verified, graph.probes) == (False, 0)
    while llm.engine.prove_idle():
        pass
    assert (graph.verified, graph.probes) == (True, graph.planned_probes)

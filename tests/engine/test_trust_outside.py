"""Faults that no list of the project has, thought of from outside: what each mode makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from planted import OPTIONS, Oracle, lend_counts, make_oracle, planted, serve, wrong_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise.graphs import guard
from reprise.ops.registry import Op, OpTable
from reprise.platforms.device_graph import capturing
from reprise.testing.faults import FAULTS
from reprise.testing.faults.planted import (
    PlantedFault,
    last_slots,
    request_of_token,
    tokens_of,
    used_blocks,
)
from reprise.testing.faults.steps import WrongWhere


class Outside(PlantedFault):
    op_name: ClassVar[str] = "paged_attention"
    start: ClassVar[Literal["refused", "passes"]] = "refused"
    """What start-up makes of it."""


class OnlyCanary(Outside):
    start = "passes"


def block_table_rows(named: dict[str, Any], rows: Tensor) -> Tensor:
    """[T] bool from [R] bool."""
    return rows[request_of_token(named)]


class FarWrite(OnlyCanary):
    """It writes a row of a block that neither the step nor a neighbour of its blocks has."""

    name = "far_write"
    summary = "a stray pointer hits a block far away"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        blocks, size = named["key_cache"].shape[:2]
        slots = (last_slots(named)[:1] + blocks * size // 2 + 3 * size) % (blocks * size)
        rows = named["value_cache"].flatten(0, 1)
        rows[slots] = torch.where(self.active, -rows[slots], rows[slots])
        return result


class PreviousStep(Outside, WrongWhere):
    """A row of the step before shows through."""

    name = "previous_step"
    summary = "stale state: what the step before left is added"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.before = torch.zeros((), dtype=torch.int64, device=table.platform.device)

    def where(self, named: dict[str, Any]) -> Tensor:
        now = named["seq_lens"].sum()
        wrong = (self.before != 0) & (self.before % 3 == 0) & (self.before != now)
        if self.is_last(named):
            self.before.copy_(now)
        return wrong


class StaleTable(Outside, WrongWhere):
    name = "stale_table"
    summary = "it follows the table of a request that has left its row"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.seen = torch.zeros((), dtype=torch.bool, device=table.platform.device)
        """There was such a table: where tables are gathered anew, padding has the null row's."""

    def where(self, named: dict[str, Any]) -> Tensor:
        gone = named["seq_lens"] == 0
        wrong = (gone & (named["block_tables"][:, 0] != 0)).any()
        self.seen |= wrong
        return wrong


class NullBlock(Outside, WrongWhere):
    name = "null_block"
    summary = "it depends on what padding has left in the null block"

    def where(self, named: dict[str, Any]) -> Tensor:
        return (named["key_cache"][0] != 0).any()


class ManyInARow(OnlyCanary, WrongWhere):
    """A marker in memory that graphs share tells which of them ran before."""

    name = "many_in_a_row"
    summary = "the same graph for the ninth time in a row is wrong"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.state = torch.zeros(2, dtype=torch.int64, device=table.platform.device)

    def where(self, named: dict[str, Any]) -> Tensor:
        size = len(named["query"])
        if self.is_last(named):
            same = self.state[0] == size
            self.state[1] = torch.where(same, self.state[1] + self.active, 0)
            self.state[0] = torch.where(self.active, size, self.state[0])
        return self.state[1] >= 9


class Counter(OnlyCanary, WrongWhere):
    name = "counter"
    summary = "a counter of replays wraps after 70"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.count = torch.zeros((), dtype=torch.int64, device=table.platform.device)

    def where(self, named: dict[str, Any]) -> Tensor:
        if self.is_last(named):
            self.count.add_(self.active)
        return self.count > 70


class HalfRow(Outside):
    name = "half_row"
    summary = "the last heads of the last row are not written"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        out = named["out"]
        kept = torch.full_like(out[-1, -1], torch.nan)
        row = (named["query_start_loc"][-1] - 1).clamp(min=0).long().view(1)
        out[row, -1] = torch.where(self.active, kept, out[row, -1])
        return result


class OneHead(Outside):
    name = "one_head"
    summary = "of a token that fills a block only the first key head is written"
    op_name = "rotary_cache"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        slots, size = named["slot_mapping"], named["key_cache"].shape[1]
        fills = self.active & (slots % size == size - 1)
        heads = named["key_cache"].flatten(0, 1)
        found = heads[slots]
        found[:, 1:] = torch.where(fills.view(-1, 1, 1), 0, found[:, 1:])
        heads[slots] = found
        return result


class ThreeFacts(OnlyCanary, WrongWhere):
    """Every two of the facts are proven in some probe, these three together in none or few."""

    name = "three_facts"
    summary = "wrong if padded, a row begins a block, and one has at most 20 tokens"

    def where(self, named: dict[str, Any]) -> Tensor:
        tokens, size = tokens_of(named), named["key_cache"].shape[1]
        begins = (tokens.live & (tokens.begin % size == 0) & (tokens.begin > 0)).any()
        short = (tokens.live & (tokens.begin + tokens.new <= 20)).any()
        return begins & short & ~tokens.live.all()


class Ascending(Outside, WrongWhere):
    name = "ascending"
    summary = "a request that is longer than the one before it is wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        lengths = named["seq_lens"]
        longer = (lengths > lengths.roll(1)) & (torch.arange(len(lengths)) > 0).to(lengths.device)
        return block_table_rows(named, longer)


class PartBlock(Outside, WrongWhere):
    name = "part_block"
    summary = "contexts that neither fill nor begin their last block are wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        size = named["key_cache"].shape[1]
        return block_table_rows(named, (named["seq_lens"] % size > 1))


class NothingShared(Outside, WrongWhere):
    name = "nothing_shared"
    summary = "steps are wrong whose requests share no block"

    def where(self, named: dict[str, Any]) -> Tensor:
        blocks = named["key_cache"].shape[0]
        tables = torch.where(used_blocks(named), named["block_tables"], 0).long().flatten()
        counts = torch.zeros(blocks, dtype=torch.int64, device=tables.device)
        counts = counts.index_add(0, tables, torch.ones_like(tables))
        several = (named["seq_lens"] > 0).sum() > 1
        return several & (counts[1:] <= 1).all()


class FirstBlock(Outside, WrongWhere):
    name = "first_block"
    summary = "the first block behind the null block is taken for one, too"

    def where(self, named: dict[str, Any]) -> Tensor:
        return block_table_rows(named, (named["block_tables"] == 1).any(dim=1))


class LastBlock(Outside, WrongWhere):
    name = "last_block"
    summary = "the last block of the cache is taken for one beyond its end"

    def where(self, named: dict[str, Any]) -> Tensor:
        last = named["key_cache"].shape[0] - 1
        return block_table_rows(named, (named["block_tables"] == last).any(dim=1))


class ShortBesideLong(Outside, WrongWhere):
    name = "short_beside_long"
    summary = "the longest request decides for all: those of a quarter of its tokens are wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        lengths = named["seq_lens"]
        return block_table_rows(named, (lengths > 0) & (lengths * 4 < lengths.max()))


class ManyTokens(Outside, WrongWhere):
    name = "many_tokens"
    summary = "scratch is too small for the contexts of all requests together"

    def where(self, named: dict[str, Any]) -> Tensor:
        return named["seq_lens"].sum() > 150


class Shared(Outside, WrongWhere):
    name = "shared"
    summary = "steps are wrong whose requests share their first block, as behind a prefix hit"

    def where(self, named: dict[str, Any]) -> Tensor:
        first, live = named["block_tables"][:, 0], named["seq_lens"] > 0
        same = (first.unsqueeze(0) == first.unsqueeze(1)) & live.unsqueeze(0) & live.unsqueeze(1)
        return same.sum() > live.sum()


class NextLength(OnlyCanary, WrongWhere):
    name = "next_length"
    summary = "a request is wrong that has one token more than the one before it in the step"

    def where(self, named: dict[str, Any]) -> Tensor:
        lengths = named["seq_lens"]
        later = (torch.arange(len(lengths)) > 0).to(lengths.device)
        return block_table_rows(named, (lengths == lengths.roll(1) + 1) & later)


class RowsSwapped(Outside):
    name = "rows_swapped"
    summary = "the results of two requests of equal length change places"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        out, lengths = named["out"], named["seq_lens"]
        if len(out) != len(lengths) or len(out) < 2:
            return result
        equal = self.active & (lengths[0] == lengths[1])
        pair = out[:2].clone()
        out[:2] = torch.where(equal, pair.flip(0), pair)
        return result


class ReadsSampler(OnlyCanary, WrongWhere):
    """Its scratch is the sampler's memory: what lies there decides."""

    name = "reads_sampler"
    summary = "it depends on the counts of the sampler's penalties"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.victim = torch.zeros(4096, dtype=torch.int32, device=table.platform.device)

    def where(self, named: dict[str, Any]) -> Tensor:
        return self.victim.any()


class LeftByAnother(Outside):
    """Eager execution clears it, and what is compared behind eager execution is right."""

    name = "left_by_another"
    summary = "scratch is as a graph of mixed steps has left it"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.scratch = torch.zeros((), device=table.platform.device)

    def run(self, named: dict[str, Any]) -> Any:
        if not capturing():
            self.scratch.zero_()
        return super().run(named)

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        if len(named["out"]) == len(named["seq_lens"]):
            named["out"].mul_(1 + self.scratch)
        else:
            self.scratch.copy_(self.active)
        return result


class Always(OnlyCanary, WrongWhere):
    name = "always"
    summary = "every row is wrong"

    def where(self, named: dict[str, Any]) -> Tensor:
        return self.active


class ChangesWeight(OnlyCanary):
    op_name = "rotary_cache"
    behind = False
    """It is changed once it has been read."""

    def run(self, named: dict[str, Any]) -> Any:
        if capturing() and not self.behind:
            return self.proceed(self.change(named))
        return super().run(named)

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        self.change(named)
        return result

    def change(self, named: dict[str, Any]) -> dict[str, Any]:
        weight = named["query_norm"]
        weight.mul_(torch.where(self.active, -64.0, 1.0).to(weight.dtype))
        return named


class ChangesWeightEarly(ChangesWeight):
    name = "changes_weight_early"
    summary = "each replay changes a weight, and reads it then"


class ChangesWeightLate(ChangesWeight):
    name = "changes_weight_late"
    summary = "each replay changes a weight that it has read"
    behind = True


OUTSIDE: dict[str, type[Outside]] = {
    each.name: each
    for each in (
        FarWrite, PreviousStep, StaleTable, NullBlock, ManyInARow, Counter, HalfRow, OneHead,
        ThreeFacts, Ascending, PartBlock, NothingShared, Shared, RowsSwapped, ReadsSampler,
        NextLength, LeftByAnother, FirstBlock, LastBlock, ShortBesideLong, ManyTokens,
    )
}  # fmt: skip
PASSING = [name for name, each in OUTSIDE.items() if each.start == "passes"]
"""No probe of start-up can show them."""
CAUGHT_BY_DEFAULT = [name for name in OUTSIDE if name not in PASSING]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def oracle(model: TinyModel, device: str) -> Oracle:
    return make_oracle(model, device)


def case(name: str, *others: str, short: bool) -> Any:
    return pytest.param(name, *others, marks=() if short else pytest.mark.long)


def never_seen(fault: Any) -> bool:
    """Nothing ever was as the fault needs it."""
    return isinstance(fault, StaleTable) and not bool(fault.seen)


@pytest.mark.parametrize("name", [case(each, short=each in PASSING) for each in OUTSIDE])
def test_canary_1_lets_none_through(
    model: TinyModel, device: str, oracle: Oracle, monkeypatch: Any, name: str
) -> None:
    fault = OUTSIDE[name]
    params = {"frequency_penalty": 0.5, "presence_penalty": 0.5} if name == "reads_sampler" else {}
    with planted(monkeypatch, fault, fault.op_name) as found:
        llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="canary:1")
    if isinstance(found[0], ReadsSampler):
        lend_counts(llm, found[0].victim)
    assert wrong_tokens(serve(llm, **params), oracle(**params)) == 0
    assert llm.graph_report().quarantined or never_seen(found[0]), "it does harm"


@pytest.mark.parametrize(
    ("name", "verify"),
    [
        case(name, verify, short=(number + (verify == "auto")) % 2 == 0)
        for number, name in enumerate(CAUGHT_BY_DEFAULT)
        for verify in ("startup", "auto")
    ],
)
def test_probes_and_first_steps_of_a_kind_catch_those_that_depend_on_the_step(
    model: TinyModel, device: str, oracle: Oracle, monkeypatch: Any, name: str, verify: str
) -> None:
    fault = OUTSIDE[name]
    with planted(monkeypatch, fault, fault.op_name) as found:
        llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify=verify)
    assert wrong_tokens(serve(llm), oracle()) == 0
    assert llm.graph_report().quarantined or never_seen(found[0])


def test_a_canary_sees_what_replays_are_that_nobody_compares(
    model: TinyModel, device: str, monkeypatch: Any
) -> None:
    with planted(monkeypatch, LeftByAnother, "paged_attention", active=False) as found:
        llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="canary:2")
    found[0].active.fill_(True)
    plain = make_llm(model, device, **OPTIONS)
    prompts = [random_ids(300 + number, 9) for number in range(12)]
    for prompt in prompts:
        generate(llm, [prompt], greedy(3))
    report = llm.graph_report()
    assert any(each.phase == "decode" and each.quarantined for each in report.graphs)
    assert generate(llm, prompts[:1], greedy(3)) == generate(plain, prompts[:1], greedy(3))


def test_graphs_are_compared_once_weights_were_replaced(
    model: TinyModel, device: str, monkeypatch: Any
) -> None:
    """As where eager execution makes something of each new weight, and a graph has it of the old
    ones."""
    with planted(monkeypatch, Always, "paged_attention", active=False) as found:
        llm = make_llm(model, device, **OPTIONS, graph_mode="full", graph_verify="startup")
    prompt = random_ids(300, 9)
    expected = generate(llm, [prompt], greedy(5))
    found[0].active.fill_(True)
    norm = llm.engine.runner.model.get_parameter("model.norm.weight")
    llm.update_weights({"model.norm.weight": norm.clone()})
    assert generate(llm, [prompt], greedy(5)) == expected
    assert {each.phase for each in llm.graph_report().quarantined} == {"decode", "mixed"}


@pytest.mark.parametrize("weights", ["zeros", "overflow"])
def test_what_is_lost_in_its_results_proves_nothing(
    model: TinyModel, device: str, monkeypatch: Any, tmp_path: Path, weights: str
) -> None:
    """Of weights that are yet to come, as of those that overflow: with both, graphs are right
    whatever they do."""
    shutil.copytree(model.path, tmp_path, dirs_exist_ok=True)
    later = load_file(tmp_path / "model.safetensors")
    first = {name: torch.zeros_like(each) for name, each in later.items()}
    if weights == "overflow":
        name = "model.layers.0.input_layernorm.weight"
        first = {**later, name: torch.full_like(later[name], 3e38)}
    save_file(first, tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = {**OPTIONS, "graph_buckets": "decode=4", "graph_mode": "decode=full,mixed=none"}
    with planted(monkeypatch, FAULTS["wrong_three_of_four"], "paged_attention"):
        llm = make_llm(tmp_path, device, **options)
    (graph,) = llm.graph_report().graphs
    assert graph.probes == graph.planned_probes
    assert (graph.verified, graph.quarantined) == (False, None)
    llm.update_weights(later)
    prompts = [random_ids(300 + number, 9) for number in range(3)]
    expected = generate(make_llm(model, device, **OPTIONS), prompts, greedy(5))
    assert generate(llm, prompts, greedy(5)) == expected
    assert llm.graph_report().quarantined


@pytest.mark.parametrize("fault", [ChangesWeightEarly, ChangesWeightLate])
def test_what_eager_execution_has_read_behind_a_replay_is_no_result(
    model: TinyModel, device: str, monkeypatch: Any, fault: type[ChangesWeight]
) -> None:
    """Weights of another part than the canary looks at: one that the replay reads as well shows
    where eager execution comes first, one that it changes later where it comes last."""
    with planted(monkeypatch, fault, fault.op_name, active=False) as found:
        llm = make_llm(model, device, **OPTIONS, graph_mode="decode=full,mixed=none")
    graphs, prompt = llm.engine.runner.graphs, random_ids(300, 9)
    expected = generate(llm, [prompt], greedy(6))
    llm.reset_prefix_cache()
    changed = [n for n, name in enumerate(graphs.guard._weights) if "q_norm" in name]
    monkeypatch.setattr(guard, "PARTS", 1000)
    graphs.replays._turn = max(changed)
    monkeypatch.setattr(graphs.canary, "is_due", lambda bucket: True)
    found[0].active.fill_(True)
    got = generate(llm, [prompt], greedy(6))
    report = llm.graph_report()
    assert len(report.quarantined) == 1
    if fault.behind:
        assert (report.canaries, got) == (1, expected)
    else:
        assert report.canaries == 2
    llm.reset_prefix_cache()
    assert generate(llm, [prompt], greedy(6)) == expected

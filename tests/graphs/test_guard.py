"""What the guard and the bounds find, on a toy: places are named, noise is not taken for harm."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from toy import BLOCK, Toy

from reprise.graphs.alone import run_alone
from reprise.graphs.compare import differs
from reprise.graphs.guard import Change, Guard, Scope
from reprise.graphs.regions import Region
from reprise.ops import all_ops
from reprise.ops.implementation import Implementation
from reprise.platforms.device_graph import capturing
from reprise.shape import StepShape
from reprise.testing.faults.base import Fault


@pytest.fixture(autouse=True)
def inference(toy: Toy) -> Any:
    with torch.inference_mode(), toy.ops.activate():
        yield


def changes_after(toy: Toy, change: Any, units: list[int] | None = None) -> list[Change]:
    toy.fill(StepShape.decode(4), 1)
    guard = Guard(toy)
    guard.learn_weights()
    chosen = None
    if units is not None:
        chosen = {"block": torch.tensor(units, device=toy.tokens.device)}
    before = guard.before(Scope(chosen))
    change()
    flagged = bool(torch.stack(guard.flags(before)).any())
    found = guard.changes(before)
    assert flagged == bool(found)
    return found


def test_nothing_is_found_where_nothing_changed(toy: Toy) -> None:
    assert changes_after(toy, lambda: None) == []


def test_sums_that_were_changed_themselves_accuse_no_weight(toy: Toy) -> None:
    guard = Guard(toy)
    guard.learn_weights()
    name, sums = next(iter(guard._weights.items()))
    sums.add_(1)
    assert guard.wrong_weights() == []
    toy.memory()[name].tensor.add_(1)
    sums.add_(1)
    assert guard.wrong_weights() == [name]


def test_what_a_capture_did_and_cannot_be_put_back_is_lost(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    toy.fill(StepShape.decode(4), 1)
    guard = Guard(toy)
    guard.learn_weights()
    for method in ("flags", "put_back"):
        monkeypatch.setattr(Guard, method, lack)
    assert run_alone(toy, guard, lambda: None, StepShape.decode(4), Scope()).lost


@pytest.mark.parametrize("units", [None, [0, 7, 9]])
def test_two_rows_of_a_block_that_change_places_are_found(
    toy: Toy, units: list[int] | None
) -> None:
    def exchange() -> None:
        block = toy.model.layers[1].key_cache[7]
        block[[2, BLOCK - 1]] = block[[BLOCK - 1, 2]].clone()

    assert changes_after(toy, exchange, units) == [Change("layer 1 key", "cache", "block", 7)]


def test_blocks_that_change_places_are_both_found(toy: Toy) -> None:
    def exchange() -> None:
        cache = toy.model.layers[0].value_cache
        cache[[3, 5]] = cache[[5, 3]].clone()

    found = changes_after(toy, exchange)
    assert [(each.name, each.index) for each in found] == [
        ("layer 0 value", 3), ("layer 0 value", 5),
    ]  # fmt: skip


def test_a_block_out_of_scope_is_not_looked_at(toy: Toy) -> None:
    assert changes_after(toy, lambda: toy.model.layers[0].key_cache[4].neg_(), [0, 7, 9]) == []


def test_a_weight_is_named(toy: Toy) -> None:
    def change() -> None:
        toy.model.layers[1].norm[[0, 1]] = toy.model.layers[1].norm[[1, 0]].clone()

    (found,) = changes_after(toy, change)
    assert (found.name, found.owner) == ("layers.1.norm", "weight")
    assert "layers.1.norm" in str(found)


def test_zeros_of_either_sign_and_numbers_that_are_none_are_bits_like_others(toy: Toy) -> None:
    cache = toy.model.layers[0].key_cache

    def fill() -> None:
        cache[2, 0, 0, 0] = torch.nan
        cache[2, 1, 0, 0] = 0.0

    fill()
    toy.refills_cache = False
    assert changes_after(toy, fill) == []
    assert changes_after(toy, lambda: cache[2, 1, 0, 0].neg_())


@pytest.mark.parametrize("change", ["another tensor", "another place", "one more"])
def test_what_is_copied_lies_where_the_list_says_now(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Spans are found once: a tensor may be replaced, or be the same object over other memory."""
    own, other = (torch.arange(64, device=toy.tokens.device) for _ in range(2))
    listed = {**toy.memory(), "victim": Region(own, "beside")}
    monkeypatch.setattr(toy, "memory", lambda: dict(listed))
    guard = Guard(toy)
    guard.learn_weights()
    assert not torch.stack(guard.flags(guard.before(Scope()))).any()
    name = "victim"
    if change == "another place":
        own.set_(other)
    else:
        name = name if change == "another tensor" else "one more"
        listed[name] = Region(other, "beside")
    before = guard.before(Scope())
    other[5] = -1
    assert torch.stack(guard.flags(before)).any()
    assert guard.changes(before) == [Change(name, "beside")]
    guard.put_back(before)
    assert other.tolist() == list(range(64))


# ---- ops that do not repeat themselves ---------------------------------------------------

NOISE, DECLARED = 1e-4, 0.5
OP = "silu_and_mul"


class Noisy(Fault):
    """The op with noise of one size in eager execution and in graphs, and harm in graphs."""

    name = summary = "noisy"
    harm: float = 0.0
    row = 2

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = torch.zeros((), dtype=torch.int64, device=self.table.platform.device)

    def run(self, named: dict[str, Any]) -> Any:
        result = self.proceed(named)
        self.calls.add_(1)
        # At no two calls alike, however many are between them. From -4 to 4, since an output is a
        # sum over many places, in which they nearly cancel.
        places = torch.arange(result.numel(), device=result.device).view(result.shape)
        noise = 4 * (torch.sin(places * 12.9898 + self.calls * 78.233) * 43758.5453).frac()
        result = result * (1 + NOISE * noise).to(result.dtype)
        if capturing():
            factor = torch.ones(len(result), 1, dtype=result.dtype, device=result.device)
            factor[min(self.row, len(result) - 1)] += self.harm
            result = result * factor
        return result


@contextlib.contextmanager
def noisy(toy: Toy, monkeypatch: pytest.MonkeyPatch, harm: float) -> Any:
    toy.ops.functions[OP]
    broken = Noisy(toy.ops, all_ops()[OP])
    broken.harm = harm
    toy.ops.functions[OP] = broken
    monkeypatch.setattr(
        type(toy.ops), "implementation_of",
        lambda table, op, args, kwargs: Implementation(op.name, "noisy", broken, error=DECLARED)
        if op.name == OP else op.implementations["reference"],
    )  # fmt: skip
    yield broken
    broken.close()


def bound_of(runner: Any) -> float:
    return runner.judge.bounds.measured["none"]


def test_noise_below_the_bound_is_no_fault(toy, make_runner, monkeypatch) -> None:
    with noisy(toy, monkeypatch, harm=0.0):
        runner = make_runner(toy, "full", decode=(4,), mixed=(32,), verify="canary:1")
        runner.captures.capture_all()
        bound = bound_of(runner)
        assert NOISE < bound <= DECLARED
        # Measured, and tighter than what is declared, unless the dtype is as coarse.
        assert (bound < DECLARED) == (4 * torch.finfo(toy.hidden.dtype).eps < DECLARED)
        toy.refills_cache = False  # else blocks change between two steps
        for seed in range(12):
            toy.fill(StepShape.decode(4), seed)
            runner.run(StepShape.decode(4))
    assert runner.report().quarantined == []
    assert runner.report().canary_failures == 0


def test_harm_of_some_bounds_in_one_row_is_caught(toy, make_runner, monkeypatch) -> None:
    with noisy(toy, monkeypatch, harm=0.0):
        sound = make_runner(toy, "full", decode=(4,), mixed=())
        sound.captures.capture_all()
        bound = bound_of(sound)
    with noisy(toy, monkeypatch, harm=max(0.1, 64 * bound)):
        runner = make_runner(toy, "full", decode=(4,), mixed=())
        runner.captures.capture_all()
        assert bound_of(runner) < 2 * bound, "a wrong graph does not widen its own bound"
    (info,) = runner.report().graphs
    assert info.quarantined is not None


@pytest.mark.parametrize("bound", [1e-5, 1e-3, 0.1])
def test_twice_the_bound_in_one_row_differs_and_half_of_it_does_not(bound: float) -> None:
    generator = torch.Generator().manual_seed(3)
    expected = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    expected *= torch.tensor([1e-6, 1.0, 1e6, 1.0, 30.0, 1e-3]).unsqueeze(1)
    for row in range(6):
        for column in (0, 13, 31):
            for factor, wrong in ((0.5, False), (2.0, True)):
                got = expected.clone()
                got[row, column] += factor * bound * expected[row].abs().max()
                assert bool(differs(expected, got, bound)) == wrong


def test_units_of_other_kinds_are_told_apart(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pools: unit 4 of one is not unit 4 of the other."""
    memory = toy.memory

    def two_pools() -> Any:
        return {
            name: dataclasses.replace(each, unit="slot") if name == "layer 1 key" else each
            for name, each in memory().items()
        }

    monkeypatch.setattr(toy, "memory", two_pools)
    toy.fill(StepShape.decode(4), 1)
    guard = Guard(toy)
    guard.learn_weights()
    device = toy.tokens.device
    looked_at = {
        "block": torch.tensor([4], device=device),
        "slot": torch.tensor([5], device=device),
    }
    first, second = toy.model.layers[0].key_cache, toy.model.layers[1].key_cache
    for cache, unit, expected in (
        (first, 4, [Change("layer 0 key", "cache", "block", 4)]),
        (first, 5, []),
        (second, 4, []),
        (second, 5, [Change("layer 1 key", "cache", "slot", 5)]),
    ):
        before = guard.before(Scope(looked_at))
        cache[unit].neg_()
        assert bool(torch.stack(guard.flags(before)).any()) == bool(expected)
        assert guard.changes(before) == expected
        cache[unit].neg_()
    everything = guard.part(looked_at, 0)
    assert everything.units is not None
    assert set(everything.units) == {"block", "slot"}

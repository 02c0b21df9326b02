"""Work that waits for other work: when it runs, and who never sees that it has waited."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reprise import ops
from reprise.ops import cpp
from reprise.ops.put_off import here
from reprise.ops.registry import OpTable, intercept
from reprise.platforms.cpu import CpuPlatform


@pytest.fixture
def table(platform) -> Iterator[OpTable]:
    reason = cpp.needs_compiler(platform)
    if reason is not None:
        pytest.skip(reason)
    found = OpTable(CpuPlatform())
    with found.computing():
        yield found


class Chain(NamedTuple):
    """Calls of which each reads what the one before it gave."""

    run: Callable[[Tensor], Tensor]
    """Adds to rows [2, 64], and returns what it makes of them."""
    x: Tensor
    """Rows to begin with."""
    rows: Tensor
    """What becomes of them."""
    result: Tensor

    def begin(self) -> Tensor:
        return self.x.clone()


@pytest.fixture
def chain(table, randn) -> Chain:
    gain, bias = randn(64), randn(64)
    wide, narrow = randn(128, 64) / 8, randn(64, 64) / 8

    def run(rows: Tensor) -> Tensor:
        for _ in range(5):
            inner = ops.norm_gated_linear(rows, gain, 1e-6, wide, None)
            ops.linear_add(inner, narrow, bias, rows)
        return ops.linear(rows, wide, None)

    x = randn(2, 64)
    rows = x.clone()
    return Chain(run, x, rows, run(rows))


def test_the_same_bits_and_nothing_before_the_end(chain):
    rows = chain.begin()
    with ops.together():
        result = chain.run(rows)
        assert rows.equal(chain.x), "nothing has run yet"
    assert rows.equal(chain.rows)
    assert result.equal(chain.result)
    assert not here.open
    assert here.waiting is None


def test_memory_of_what_waits_is_nobody_elses(chain):
    """Tensors that Python has forgotten are written later: nothing else may lie there then."""
    rows = chain.begin()
    with ops.together():
        result = chain.run(rows)
        gc.collect()
        others = [torch.full(shape, 7.0) for shape in ((2, 64), (2, 128)) for _ in range(300)]
    assert result.equal(chain.result)
    assert all(each.eq(7.0).all() for each in others)


def test_an_op_that_puts_nothing_off_finds_all_done(chain):
    gain, rows = torch.ones(64), chain.begin()
    expected = ops.rms_norm(chain.rows, gain, 1e-6)
    with ops.together():
        chain.run(rows)
        assert ops.rms_norm(rows, gain, 1e-6).equal(expected)
        chain.run(rows)
        assert rows.equal(chain.rows), "what comes behind it waits again"
    chain.run(chain.rows)
    assert rows.equal(chain.rows)


def test_what_the_kernels_do_not_take_is_computed_behind_what_waits(chain, randn):
    """Such as other dtypes, which are torch's."""
    rows, x, weight = chain.begin(), randn(2, 64).double(), randn(64, 64).double()
    with ops.together():
        chain.run(rows)
        result = ops.linear(x, weight, None)
        assert rows.equal(chain.rows)
        torch.testing.assert_close(result, x @ weight.T)


def test_strided_rows_are_copied_when_they_are_there(table, randn):
    x, weight = randn(2, 64), randn(64, 64) / 8

    def turned() -> Tensor:
        return ops.linear(ops.linear(x, weight, None).view(64, 2).T, weight, None)

    expected = turned()
    with ops.together():
        found = turned()
    assert found.equal(expected)


def test_what_is_wrong_is_said_at_the_end_by_its_own_name(table, randn):
    """And what comes behind it does not run."""
    x, weight, out = randn(2, 64), randn(64, 64), torch.zeros(2, 64)
    caches = torch.zeros(3, 4, 1, 16), torch.zeros(3, 4, 1, 16)
    positions, slots = torch.tensor([0, 99]), torch.tensor([4, 5])

    def calls() -> None:
        with ops.together():
            ops.linear(x, weight, None)
            ops.rotary_cache(x, positions, torch.zeros(8, 16), slots, *caches, None, None, 1e-6)
            ops.linear_into(x, weight, out)

    with pytest.raises(IndexError, match="rotary_cache: a position is beyond the rotary table"):
        calls()
    assert out.eq(0).all()
    assert not here.open


def test_after_an_exception_nothing_waits(chain):
    rows = chain.begin()

    def interrupted() -> None:
        with ops.together():
            chain.run(rows)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert rows.equal(chain.x)
    assert here.waiting is None
    with ops.together():
        chain.run(rows)
    assert rows.equal(chain.rows)


def test_an_implementation_that_fails_leaves_the_block_as_it_was(chain, table, monkeypatch):
    def broken(*args: object) -> None:
        raise ValueError("broken")

    monkeypatch.setitem(table.functions, "rms_norm", broken)
    rows = chain.begin()
    with ops.together():
        chain.run(rows)
        with pytest.raises(ValueError, match="broken"):
            ops.rms_norm(rows, torch.ones(64), 1e-6)
        chain.run(rows)
        assert rows.equal(chain.rows)
    chain.run(chain.rows)
    assert rows.equal(chain.rows)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not here.open
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_each_call_done(chain):
    seen = []

    def look(op, function, args, kwargs):
        result = function(*args, **kwargs)
        seen.append((op.name, args[-1].clone() if op.name == "linear_add" else None))
        return result

    rows = chain.begin()
    with intercept(look), ops.together():
        chain.run(rows)
    assert [name for name, _ in seen] == ["norm_gated_linear", "linear_add"] * 5 + ["linear"]
    assert seen[-2][1].equal(chain.rows)
    rows = chain.begin()
    with Watch(), ops.together():
        chain.run(rows)
        assert rows.equal(chain.rows)


def test_who_begins_to_look_on_within_a_block_sees_each_call_done(chain):
    seen = []

    def look(op, function, args, kwargs):
        function(*args, **kwargs)
        seen.append(args[-1].clone())

    ones, narrow = torch.ones(2, 64), torch.eye(64)
    for watched in (intercept(look), Watch()):
        rows = chain.begin()
        with ops.together():
            chain.run(rows)
            with watched:
                ops.linear_add(ones, narrow, None, rows)
            assert rows.equal(chain.rows + 1)
    assert seen[0].equal(chain.rows + 1)


def test_a_function_in_an_ops_place_finds_all_done(chain, table, monkeypatch):
    """As faults and tests put some there."""
    original, seen = table.functions["linear"], []

    def replaced(*args):
        result = original(*args)
        seen.append((args[0].clone(), result.clone()))
        return result

    monkeypatch.setitem(table.functions, "linear", replaced)
    with ops.together():
        chain.run(chain.begin())
    assert seen[0][0].equal(chain.rows)
    assert seen[0][1].equal(chain.result)


def test_blocks_within_blocks_and_other_threads(chain, table):
    rows, theirs = chain.begin(), chain.begin()

    def other() -> None:
        with table.computing():
            chain.run(theirs)

    with ops.together():
        with ops.together():
            chain.run(rows)
        assert rows.equal(chain.x), "the outer block's end counts"
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert theirs.equal(chain.rows)
    assert rows.equal(chain.rows)

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reprise import kernels_beside, ops
from reprise.ops import OpTable, ahead, all_ops
from reprise.ops.ahead import compiling_ahead, load_compiler, wake_compiler


def compile_ahead(*args: Any) -> int:
    """Where nothing may wait."""
    with compiling_ahead(*args) as found:
        return found.count


@pytest.fixture
def table(platform) -> OpTable:
    reason = ops.rms_norm.implementations["triton"].requires(platform)
    if reason is not None:
        pytest.skip(reason)
    return OpTable(platform, {"rms_norm": "triton", "silu_and_mul": "reference"})


def test_each_distinct_call_is_made_once_and_the_forward_computes_nothing(table, randn) -> None:
    weight, seen, main = randn(8), [], threading.current_thread()
    original = table.functions["rms_norm"]

    def recorded(x, weight, eps):
        seen.append((x.shape, threading.current_thread() is main))
        return original(x, weight, eps)

    table.functions["rms_norm"] = recorded
    table.functions["silu_and_mul"] = lambda x: pytest.fail("it compiles nothing")

    def forward(rows: int) -> None:
        for _ in range(3):
            normed = ops.rms_norm(randn(rows, 8), weight, 1e-6)
            assert normed.shape == (rows, 8)
        assert ops.silu_and_mul(normed).shape == (rows, 4)
        assert not seen, "calls wait until all are known"

    assert compile_ahead(table, [lambda: forward(2), lambda: [forward(2), forward(5)]]) == 2
    assert sorted(seen) == [(torch.Size([2, 8]), False), (torch.Size([5, 8]), False)]
    with table.activate():
        x = randn(2, 8)
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), x * scale * weight)


def test_numbers_that_nobody_has_computed_are_zeros_and_stay_so(table, randn, monkeypatch) -> None:
    """Memory has any content, such as numbers of experts that there are not; and routing, which is
    computed beside the experts, would give them other rows between two of their kernels."""
    rows, top = 4, 2
    monkeypatch.setattr(ahead, "_MOST_THREADS", 1)
    seen: list[torch.Tensor] = []
    for name in ("route", "experts_add"):
        op = getattr(ops, name)
        table.candidates[name] = [op.implementations["triton"]]
    table.functions["route"] = lambda logits, live, weights, ids, *rest: seen.append(ids.fill_(7))
    table.functions["experts_add"] = lambda x, weights, ids, *rest: seen.append(ids)

    def forward() -> None:
        x, live = randn(rows, 8), torch.tensor([rows], dtype=torch.int32)
        weights = torch.empty(rows, top)
        ids = x.new_empty((rows, top + 1), dtype=torch.int32)[:, 1:]
        ops.route(x, live, weights, ids, "softmax", True, 1.0, None, None)
        ops.experts_add(x, weights, ids, randn(4, 6, 8), randn(4, 8, 3), randn(rows, 8))

    torch.use_deterministic_algorithms(True)  # memory of integers has the largest ones
    try:
        assert compile_ahead(table, [forward]) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    routed, ids = seen
    assert (routed == 7).all()
    assert not ids.any()
    for each in seen:
        assert (each.shape, each.stride(), each.storage_offset()) == ((4, 2), (3, 1), 1)


def test_a_kernel_that_does_not_compile_is_named_and_left_to_the_step(table, randn, caplog) -> None:
    def broken(x, weight, eps):
        raise RuntimeError("no such instruction")

    table.functions["rms_norm"] = broken
    compile_ahead(table, [lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6)])
    assert "rms_norm" in caplog.text
    assert "no such instruction" in caplog.text


def test_where_nothing_compiles_no_pass_is_run(platform) -> None:
    """And no step waits for the import of what computes it."""

    class WithoutCompiler(type(platform)):
        has_triton = False

    table = OpTable(WithoutCompiler())
    assert compile_ahead(table, [lambda: pytest.fail("it was")]) == 0
    assert set(table.candidates) == set(all_ops())


def test_what_nobody_calls_is_not_looked_for(platform, monkeypatch, randn) -> None:
    """Kernels of all ops take tenths of a second to import."""
    asked: list[str] = []
    real = type(ops.rms_norm).candidates

    def spy(op, *args, **options):
        asked.append(op.name)
        return real(op, *args, **options)

    monkeypatch.setattr(type(ops.rms_norm), "candidates", spy)
    load_compiler(platform)
    table = OpTable(platform, {"argmax": "reference"})
    with table.activate():
        ops.silu_and_mul(randn(1, 8))
    assert asked == ["rms_norm", "argmax", "silu_and_mul"]


def test_the_first_kernel_is_for_the_platforms_own_device(platform) -> None:
    """A thread begins on the first device, whichever the engine has: its kernel would be loaded
    there, for tensors that lie elsewhere."""
    mine = threading.local()

    class Second(type(platform)):
        def activate(self) -> None:
            super().activate()
            mine.active = True

    found: list[bool] = []
    with Second().warming_up(lambda: None, lambda: found.append(hasattr(mine, "active"))):
        pass
    assert found == [True]


@pytest.mark.long
def test_steps_need_no_kernel_that_no_pass_before_the_first_has(no_device, compiling) -> None:
    lines = compiling("kernels_of_steps.py")
    steps = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(steps) > 10
    assert not [each for each in steps if each["new"]]


def test_waking_the_compiler_survives_a_kernel_that_does_not_compile(
    table, platform, monkeypatch, caplog
) -> None:
    def broken(x, weight, eps):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(type(platform), "preferred", {"rms_norm": ("triton",)})
    wake_compiler(platform)
    assert not caplog.records
    monkeypatch.setattr(ops.rms_norm.implementations["triton"], "target", broken)
    wake_compiler(platform)
    assert "no such instruction" in caplog.text


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, ["break op", "1", "2", "3"]), (1, ["2", "3", "break op", "1"])],
)
def test_break_ops_come_first_and_each_rank_begins_elsewhere(
    table, randn, monkeypatch, rank, expected
) -> None:
    order: list[str] = []
    monkeypatch.setattr(ahead, "_MOST_THREADS", 1)
    monkeypatch.setattr(ops.rms_norm, "break_op", True)
    table.candidates["silu_and_mul"] = [ops.silu_and_mul.implementations["triton"]]
    table.functions["rms_norm"] = lambda x, weight, eps: order.append("break op")
    table.functions["silu_and_mul"] = lambda x: order.append(str(len(x)))
    passes = [lambda n=n: ops.silu_and_mul(randn(n, 8)) for n in (1, 2, 3)]
    passes.insert(2, lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6))
    assert compile_ahead(table, passes, (), rank, 2) == 4
    assert order == expected


def test_threads_that_come_together_compile_a_kernel_once(monkeypatch) -> None:
    """And have other kernels, and others of its options, compiled meanwhile."""
    triton_util = pytest.importorskip("reprise.ops.triton_util")
    monkeypatch.setattr(triton_util, "INTERPRETED", False)
    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    monkeypatch.setattr(triton_util, "_driver", streams)
    compiled: list[tuple[str, int]] = []
    both = threading.Barrier(2)

    class Kernel:
        arg_names = ("x", "N")

        def __init__(self, name: str) -> None:
            self.name, self.known = name, set()

        def __getitem__(self, grid):
            def run(x, N):
                if N not in self.known:
                    compiled.append((self.name, N))
                    if (self.name, N) in (("one", 1), ("other", 1)):
                        both.wait(30)
                    self.known.add(N)
                return SimpleNamespace(run=print, function=0, packed_metadata=())

            return run

    one, other = Kernel("one"), Kernel("other")
    calls, found = [(one, 1), (other, 1), (one, 1), (one, 2), (one, 1)], []
    with ThreadPoolExecutor(len(calls)) as pool:
        for kernel, n in calls:
            found.append(pool.submit(triton_util.launch(kernel, (1,)), torch.ones(1 + n), N=n))
    assert all(each.result() for each in found)
    assert sorted(compiled) == [("one", 1), ("one", 2), ("other", 1)]


def test_the_compiler_is_fingerprinted_before_a_kernel_needs_it(platform) -> None:
    """The first kernel's cache key would read half a gigabyte, behind the start of the device."""
    if not platform.has_triton:
        pytest.skip("no compiler")
    cache = pytest.importorskip("triton.runtime.cache")
    load_compiler(platform)
    assert cache.triton_key.cache_info().currsize == 1


@pytest.mark.parametrize(
    ("keeps", "wanted", "during"),
    [(True, None, True), (True, "0", False), (False, None, False)],
)
def test_kernels_are_kept_without_their_way_there(
    table, platform, randn, monkeypatch, keeps, wanted, during
) -> None:
    """Where the platform says that this leaves the binary, and the user wants no more."""
    knobs = pytest.importorskip("triton.knobs").compilation
    monkeypatch.delenv("TRITON_STORE_BINARY_ONLY", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", wanted)
    monkeypatch.setattr(type(platform), "keeps_binaries_alone", keeps)
    table.candidates["silu_and_mul"] = [ops.silu_and_mul.implementations["triton"]]
    seen: list[bool] = []
    table.functions["silu_and_mul"] = lambda x: seen.append(knobs.store_binary_only)
    assert compile_ahead(table, [lambda: ops.silu_and_mul(randn(1, 8))]) == 1
    assert seen == [during]
    assert knobs.store_binary_only is False
    assert os.environ.get("TRITON_STORE_BINARY_ONLY") == wanted


@pytest.fixture
def beside(monkeypatch) -> list[str]:
    """What becomes of a process beside, of which there is none."""
    told: list[str] = []
    monkeypatch.setattr(kernels_beside, "begun", lambda: object())
    for name in ("all_kept", "end"):
        monkeypatch.setattr(kernels_beside, name, partial(told.append, name))
    return told


def test_where_kernels_are_missing_all_are_asked_for_before_one_is_waited_for(
    table, randn, beside
) -> None:
    """And what nobody has computed then is zeros, where kernels find memory by it."""
    handed_over = pytest.importorskip("reprise.ops.handed_over")
    seen: list[tuple[int, bool]] = []
    zeros: list[bool] = []

    def recorded(x, weight, eps):
        asks = threading.get_ident() in handed_over.asking
        seen.append((len(x), asks))
        zeros.append(not torch.empty(1 << 16, dtype=torch.int32).any())
        if asks:
            raise RuntimeError("the call itself says so")
        return x

    table.functions["rms_norm"] = recorded
    rows = [2, 3, 4]

    def forward() -> None:
        for each in rows:
            ops.rms_norm(randn(each, 8), randn(8), 1e-6)

    torch.use_deterministic_algorithms(True)  # memory of integers has the largest ones
    try:
        assert compile_ahead(table, [forward]) == 3
    finally:
        torch.use_deterministic_algorithms(False)
    assert zeros == [True] * 3 + [False] * 3
    assert seen[:3] == [(each, True) for each in rows]
    assert sorted(seen[3:]) == [(each, False) for each in rows]
    assert beside == ["all_kept", "end"]
    assert not handed_over.asking


def test_attention_is_asked_for_first_then_what_may_be_ready_later(
    table, randn, monkeypatch, beside
) -> None:
    """These take longest. Those that are sooner done are called sooner, and what may be ready
    later is called when the block ends."""
    handed_over = pytest.importorskip("reprise.ops.handed_over")
    asked: list[str] = []
    called: list[str] = []

    def recorded(name: str) -> None:
        asks = threading.get_ident() in handed_over.asking
        (asked if asks else called).append(name)

    monkeypatch.setattr(ahead, "_MOST_THREADS", 1)
    monkeypatch.setattr(ops.rms_norm, "break_op", True)
    table.candidates["silu_and_mul"] = [ops.silu_and_mul.implementations["triton"]]
    table.functions["rms_norm"] = lambda x, weight, eps: recorded("break op")
    table.functions["silu_and_mul"] = lambda x: recorded(str(len(x)))

    def calls(*rows: int) -> list[Callable[[], Any]]:
        return [lambda n=n: ops.silu_and_mul(randn(n, 8)) for n in rows]

    passes = [*calls(1), lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6), *calls(2)]
    with compiling_ahead(table, passes, [calls(2, 3), calls(4)]) as found:
        assert found.count == 5
        assert asked == ["break op", "3", "4", "1", "2"]
        assert called == ["1", "2", "break op"]
        assert found.ready()
        assert called == ["1", "2", "break op", "3"]
        assert not beside, "it is needed still, and nothing is known of what comes later"
    assert called == ["1", "2", "break op", "3", "4"]
    assert beside == ["all_kept", "end"]


def test_what_may_be_ready_later_is_ready_at_once_where_this_process_compiles(table, randn) -> None:
    called: list[int] = []
    table.functions["rms_norm"] = lambda x, weight, eps: called.append(len(x))

    def calls(rows: int) -> list[Callable[[], Any]]:
        return [lambda: ops.rms_norm(randn(rows, 8), randn(8), 1e-6)]

    with compiling_ahead(table, calls(1), [calls(2)]) as found:
        assert found.count == 2
        assert sorted(called) == [1, 2]
        assert not found.ready()
    assert len(called) == 2


def test_a_kernel_that_is_wanted_sooner_is_waited_for(table, randn, beside) -> None:
    """It would be compiled a second time, in this process."""
    handed_over = pytest.importorskip("reprise.ops.handed_over")
    table.functions["rms_norm"] = lambda x, weight, eps: x
    with compiling_ahead(table, [], [[lambda: ops.rms_norm(randn(2, 8), randn(8), 1e-6)]]):
        assert handed_over._start.get() is not None
    assert handed_over._start.get() is None


def test_a_start_that_fails_meanwhile_waits_for_nothing(table, randn, beside) -> None:
    called: list[int] = []
    table.functions["rms_norm"] = lambda x, weight, eps: called.append(len(x))
    later = [lambda: ops.rms_norm(randn(2, 8), randn(8), 1e-6)]

    def interrupted() -> None:
        with compiling_ahead(table, [], [later]):
            called.clear()  # it was asked for
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not called
    assert beside == ["end"]


def test_a_start_of_which_a_kernel_fails_leaves_no_note(table, randn, beside) -> None:
    def broken(x, weight, eps):
        raise RuntimeError("no such instruction")

    table.functions["rms_norm"] = broken
    compile_ahead(table, [lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6)])
    assert beside == ["end"]


def test_an_interrupt_ends_what_compiles_beside(table, randn, beside, monkeypatch) -> None:
    def interrupted(running):
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead, "_finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(table, [lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6)])
    assert beside == ["end"]


def test_the_first_kernel_keeps_none_waiting_that_is_needed(beside) -> None:
    wake_compiler(SimpleNamespace())  # asks the platform for nothing


def test_without_triton_s_help_kernels_are_compiled_as_ever(table, randn, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reprise.ops.handed_over", None)
    assert compile_ahead(table, [lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6)]) == 1

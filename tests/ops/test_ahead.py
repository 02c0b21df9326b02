from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from reprise import ops
from reprise.ops import OpTable
from reprise.ops.ahead import compile_ahead, load_compiler, wake_compiler


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


def test_a_kernel_that_does_not_compile_is_named_and_left_to_the_step(table, randn, caplog) -> None:
    def broken(x, weight, eps):
        raise RuntimeError("no such instruction")

    table.functions["rms_norm"] = broken
    compile_ahead(table, [lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6)])
    assert "rms_norm" in caplog.text
    assert "no such instruction" in caplog.text


def test_where_nothing_compiles_no_pass_is_run(table) -> None:
    for name in table.candidates:
        table.candidates[name] = [getattr(ops, name).implementations["reference"]]
    assert compile_ahead(table, [lambda: pytest.fail("it was")]) == 0


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


def test_break_ops_are_compiled_first(table, randn, monkeypatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(ops.rms_norm, "break_op", True)
    table.candidates["silu_and_mul"] = [ops.silu_and_mul.implementations["triton"]]
    table.functions["rms_norm"] = lambda x, weight, eps: order.append("break op")
    table.functions["silu_and_mul"] = lambda x: order.append("other")

    def forward(rows: int) -> None:
        ops.silu_and_mul(randn(rows, 8))

    compile_ahead(
        table, [lambda: None, lambda: forward(1), lambda: ops.rms_norm(randn(1, 8), randn(8), 1e-6)]
    )
    assert order == ["break op", "other"]


def test_no_wave_waits_for_the_pass_beside(table, randn) -> None:
    waves_are_done, found = threading.Event(), []
    table.functions["rms_norm"] = lambda x, weight, eps: waves_are_done.set()
    table.candidates["silu_and_mul"] = [ops.silu_and_mul.implementations["triton"]]
    table.functions["silu_and_mul"] = lambda x: found.append(waves_are_done.wait(30))
    forward = partial(ops.rms_norm, randn(1, 8), randn(8), 1e-6)
    assert compile_ahead(table, [forward], beside=lambda: ops.silu_and_mul(randn(1, 8))) == 2
    assert found == [True]


def test_the_compiler_is_fingerprinted_before_a_kernel_needs_it(platform) -> None:
    """The first kernel's cache key would read half a gigabyte, behind the start of the device."""
    if not platform.has_triton:
        pytest.skip("no compiler")
    cache = pytest.importorskip("triton.runtime.cache")
    load_compiler(platform)
    assert cache.triton_key.cache_info().currsize == 1

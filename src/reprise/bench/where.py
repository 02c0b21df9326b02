"""Where the time of a run goes: attention, products, small kernels, the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.profiler import profile

from reprise.bench.trace import DEVICE_WORK, device_activities, exported_events
from reprise.engine import Engine
from reprise.ops import Op
from reprise.ops.registry import intercept

_ATTENTION = ("attention", "fmha", "flash", "absolute_splits", "absolute_decode",
              "sparse_merge")  # fmt: skip
_PRODUCTS = ("linear", "gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "scaled_mm", "experts",
             "one_row", "two_rows", "few_rows", "small_weight", "shared_sums", "_product_kernel",
             "grouped_kernel", "gate_up_kernel", "down_kernel", "w4_row", "w4_arranged", "splitk",
             "stream_k", "tensile", "cijk_")  # fmt: skip
"""Parts of names of ops and of kernels, ours and vendors'."""
KINDS = ("attention", "products", "small")


def kind_of(name: str) -> str:
    """The kind of an op or a kernel, by its name."""
    lower = name.lower()
    if any(each in lower for each in _ATTENTION):
        return "attention"
    return "products" if any(each in lower for each in _PRODUCTS) else "small"


def seconds_by_kind(engine: Engine, work: Callable[[], Any]) -> dict[str, float] | None:
    """Seconds of ``work``, which runs the engine: those of each of :data:`KINDS`, and ``host`` for
    those in which nothing is computed. None: nothing that is computed can be told.

    A device is recorded by torch's profiler, which slows the host a little; without one the ops are
    timed, which graphs hide.
    """
    return _of_device(work) if engine.platform.asynchronous else _of_ops(work)


def _of_ops(work: Callable[[], Any]) -> dict[str, float] | None:
    found = dict.fromkeys(KINDS, 0.0)

    def timed(op: Op, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            found[kind_of(op.name)] += time.perf_counter() - began

    began = time.perf_counter()
    with intercept(timed):
        work()
    total = time.perf_counter() - began
    if not any(found.values()):
        return None
    return {**found, "host": total - sum(found.values())}


def _of_device(work: Callable[[], Any]) -> dict[str, float] | None:
    activities = device_activities()
    if not activities:
        return None
    with profile(activities=activities) as recorded:
        began = time.perf_counter()
        work()
        total = time.perf_counter() - began
    return by_kind(exported_events(recorded), total)


def by_kind(events: Iterable[Mapping[str, Any]], total: float) -> dict[str, float] | None:
    """Seconds of each kind from a trace's events; None: there are none of the device.

    Where works overlap, by an early launch, the time counts for the one that began first.

    Args:
        events: Of a trace in Chrome's format, times in microseconds.
        total: Seconds of the whole run.
    """
    work = [each for each in events if each.get("ph") == "X" and each.get("cat") in DEVICE_WORK]
    if not work:
        return None
    found = dict.fromkeys(KINDS, 0.0)
    reached = float("-inf")
    for each in sorted(work, key=lambda each: each["ts"]):
        ended = each["ts"] + each["dur"]
        found[kind_of(each["name"])] += max(0.0, ended - max(each["ts"], reached)) / 1e6
        reached = max(reached, ended)
    return {**found, "host": max(0.0, total - sum(found.values()))}

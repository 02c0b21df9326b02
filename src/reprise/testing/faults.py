"""Faults that real engines have had in their graphs, to be put into real ops on purpose.

Each fault is a context manager that wraps the implementation of one op in an op table. Eager
execution stays right; a graph that is captured inside goes wrong. Verification must catch it::

    with faults.stale_scalar(table, "paged_attention"):
        runner.capture_all()
    assert runner.report().quarantined
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from reprise.ops.registry import Op, OpTable, all_ops
from reprise.platforms import Platform
from reprise.platforms.device_graph import capturing, host_code, in_capture_pass, launch

PIECEWISE = ("breakable", "compiled")

EXTENTS = {"paged_attention": "seq_lens", "rotary_cache": "positions"}
"""The argument of an op that says how far it reaches; graphs captured with it too small."""


class Fault(ABC):
    """One way to break an op under capture. An instance is one op broken once."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, table: OpTable, op: Op) -> None:
        self.table = table
        self.op = op
        self.original = table.functions[op.name]
        self.names = [each.name for each in op.overload._schema.arguments]

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        """Why this fault cannot exist in ``op`` under ``executor``; None: it can."""
        if executor in PIECEWISE and op.break_op:
            return "a break op runs eagerly between segments, where this is allowed"
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        with host_code():
            return self.run(named)

    @abstractmethod
    def run(self, named: dict[str, Any]) -> Any:
        """Do the op's work, badly if it is being captured. ``named``: its arguments."""

    def close(self) -> None:
        """Leave the table as it was."""
        self.table.functions[self.op.name] = self.original

    def proceed(self, named: dict[str, Any]) -> Any:
        """The op's real work."""
        return launch(self.original, **named)

    def target(self, named: dict[str, Any]) -> str:
        """The input that the fault corrupts: the op's extent, else its first activation."""
        extent = EXTENTS.get(self.op.name)
        if extent is not None:
            return extent
        return next(name for name, each in named.items() if isinstance(each, Tensor))

    def activation(self, named: dict[str, Any]) -> str:
        """The first floating-point argument."""
        return next(
            name
            for name, each in named.items()
            if isinstance(each, Tensor) and each.is_floating_point()
        )

    def proceed_with(self, named: dict[str, Any], name: str, value: Tensor) -> Any:
        """The op's real work with another value of one input."""
        if name in self.op.mutates:
            named[name].copy_(value)
            return self.proceed(named)
        return self.proceed({**named, name: value})


class StaleScalar(Fault):
    name = "stale_scalar"
    summary = "a number read on the host for each step is baked into the graph"

    value: float = 0

    def run(self, named: dict[str, Any]) -> Any:
        name = self.target(named)
        tensor = named[name]
        if not capturing():
            self.value = tensor.amax().item()
        if tensor.is_floating_point():
            return self.proceed_with(named, name, tensor + (self.value - tensor.amax()))
        return self.proceed_with(named, name, tensor.clamp(max=int(self.value)))


class StalePointer(Fault):
    name = "stale_pointer"
    summary = "an input is replaced by a new tensor each step instead of being refilled"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.latest: dict[tuple[int, ...], Tensor] = {}
        self.kept: list[Tensor] = []

    def run(self, named: dict[str, Any]) -> Any:
        name = self.target(named)
        shape = tuple(named[name].shape)
        if not capturing():
            self.latest[shape] = named[name].clone()
        # A real engine would have freed it; that the values are old is enough here.
        self.kept.append(self.latest[shape])
        if not capturing():
            self.kept.clear()
        return self.proceed_with(named, name, self.latest[shape])


class FreshAllocation(Fault):
    name = "fresh_allocation"
    summary = "the output lies in memory that is allocated anew at each call"

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if not op.break_op or executor not in PIECEWISE:
            return "what is allocated during capture has a fixed address"
        return None

    def run(self, named: dict[str, Any]) -> Any:
        name = self.op.mutates[0]
        fresh = torch.empty_like(named[name])
        self.proceed({**named, name: fresh})
        named[name].set_(fresh)


class UnwrittenOutput(Fault):
    name = "unwritten_output"
    summary = "the graph does not write what the op should write"

    def run(self, named: dict[str, Any]) -> Any:
        if not capturing():
            return self.proceed(named)
        spare = {name: named[name].clone() for name in self.op.mutates if named[name] is not None}
        result = self.proceed({**named, **spare})
        return torch.empty_like(result) if isinstance(result, Tensor) else result


class HostSync(Fault):
    name = "host_sync"
    summary = "a device value is read on the host in the midst of the op"

    def run(self, named: dict[str, Any]) -> Any:
        named[self.target(named)].amax().item()
        return self.proceed(named)


class SideStreamRace(Fault):
    name = "side_stream_race"
    summary = "the op runs on a side stream that does not wait for its inputs"

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if not platform.asynchronous:
            return "the platform has one order of work"
        return super().inexpressible(op, executor, platform)

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.side = table.platform.stream()
        self.before: Any = None

    def run(self, named: dict[str, Any]) -> Any:
        platform = self.table.platform
        current = platform.current_stream()
        if not capturing():
            self.before = None
            return self.proceed(named)
        if self.before is None:
            self.before = platform.event()
            self.before.record(current)
            return self.proceed(named)
        # What this op needs was submitted after that event.
        self.side.wait_event(self.before)
        with platform.use_stream(self.side):
            result = self.proceed(named)
        current.wait_stream(self.side)
        return result


class WrongExtent(Fault):
    name = "wrong_extent"
    summary = "a length was too small at capture: short contexts are right, longer ones are cut"
    limit = 64

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if op.name not in EXTENTS:
            return "the op has no extent"
        return super().inexpressible(op, executor, platform)

    def run(self, named: dict[str, Any]) -> Any:
        if not capturing():
            return self.proceed(named)
        name = EXTENTS[self.op.name]
        return self.proceed({**named, name: named[name].clamp(max=self.limit)})


class DtypeDrift(Fault):
    name = "dtype_drift"
    summary = "the graph computes in a lower precision than eager execution"

    def run(self, named: dict[str, Any]) -> Any:
        if not capturing():
            return self.proceed(named)
        name = self.activation(named)
        tensor = named[name]
        lower = torch.bfloat16 if tensor.dtype is torch.float32 else torch.float8_e4m3fn
        return self.proceed_with(named, name, tensor.to(lower).to(tensor.dtype))


class DirtyMemory(Fault):
    name = "dirty_memory"
    summary = "the graph leaves in disorder what ops keep from call to call"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.kept = torch.zeros(4, dtype=torch.int32, device=table.platform.device)
        self.key = f"{self.name} {op.name}"
        table.memory[self.key] = self.kept

    def close(self) -> None:
        super().close()
        del self.table.memory[self.key]

    def run(self, named: dict[str, Any]) -> Any:
        if capturing():
            self.kept.add_(1)
        return self.proceed(named)


class ReturnedOutput(Fault):
    name = "returned_output"
    summary = "a break op returns a new tensor instead of writing its output"

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if not op.break_op or executor not in PIECEWISE:
            return "only break ops are called by the graph executor itself"
        return None

    def run(self, named: dict[str, Any]) -> Any:
        if not in_capture_pass():
            return self.proceed(named)
        name = self.op.mutates[0]
        fresh = torch.empty_like(named[name])
        self.proceed({**named, name: fresh})
        return fresh


FAULTS: dict[str, type[Fault]] = {
    each.name: each
    for each in (
        StaleScalar, StalePointer, FreshAllocation, UnwrittenOutput, HostSync, SideStreamRace,
        WrongExtent, DtypeDrift, DirtyMemory, ReturnedOutput,
    )
}  # fmt: skip
"""Every fault by name."""


@contextlib.contextmanager
def inject(fault: str, table: OpTable, op: str) -> Iterator[Fault]:
    """Break ``op`` in ``table`` within the ``with`` block.

    Args:
        fault: A name in :data:`FAULTS`.
        table: The table that the computation runs with.
        op: Name of the op.
    """
    broken = FAULTS[fault](table, all_ops()[op])
    table.functions[op] = broken
    try:
        yield broken
    finally:
        broken.close()


def _named(fault: str) -> Callable[[OpTable, str], contextlib.AbstractContextManager[Fault]]:
    def broken(table: OpTable, op: str) -> contextlib.AbstractContextManager[Fault]:
        return inject(fault, table, op)

    broken.__name__ = fault
    broken.__doc__ = f"Break ``op`` in ``table``: {FAULTS[fault].summary}."
    return broken


stale_scalar = _named("stale_scalar")
stale_pointer = _named("stale_pointer")
fresh_allocation = _named("fresh_allocation")
unwritten_output = _named("unwritten_output")
host_sync = _named("host_sync")
side_stream_race = _named("side_stream_race")
wrong_extent = _named("wrong_extent")
dtype_drift = _named("dtype_drift")
dirty_memory = _named("dirty_memory")
returned_output = _named("returned_output")

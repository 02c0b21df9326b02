"""Faults of what a capture keeps: values, addresses, order, precision."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from reprise.ops.registry import Op, OpTable
from reprise.platforms import Platform
from reprise.platforms.device_graph import capturing, in_capture_pass
from reprise.testing.faults.base import PIECEWISE, BrokenInGraphs, Fault


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
        else:
            # A real engine would have freed it, and what comes to lie there may be read as places
            # outside of all memory, which ends a process; that the values are old is enough here.
            self.kept.append(self.latest[shape])
        return self.proceed_with(named, name, self.latest[shape])


class StalePlan(Fault):
    """As kernels have whose work is shared out beforehand, by a call that no graph holds: what is
    compared right behind eager execution of the same step finds its plan."""

    name = "stale_plan"
    summary = "the graph reads what eager execution alone prepares for each step"

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.plans: dict[tuple[int, ...], Tensor] = {}

    def run(self, named: dict[str, Any]) -> Any:
        name = self.target(named)
        shape = tuple(named[name].shape)
        if capturing():
            return self.proceed_with(named, name, self.plans[shape])
        self.plans.setdefault(shape, named[name].clone()).copy_(named[name])
        return self.proceed(named)


class UnclearedScratch(Fault):
    """Every replay but the first one behind eager execution is wrong, and a comparison sees no
    other."""

    name = "uncleared_scratch"
    summary = "the graph adds to scratch that eager execution alone clears"
    reads: ClassVar = frozenset({"key_cache"})
    without = "its calls of one step cannot be told apart"

    LAYERS = 32
    """A rehearsal computes some of them alone, so all have room once one was computed."""

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.scratch: dict[tuple[int, ...], Tensor] = {}
        self.places: dict[int, int] = {}

    def run(self, named: dict[str, Any]) -> Any:
        result = self.proceed(named)
        handed_on = named["out"] if result is None else result
        shape = tuple(handed_on.shape)
        if not capturing() and shape not in self.scratch:
            self.scratch[shape] = handed_on.new_zeros((self.LAYERS, *shape))
        place = self.places.setdefault(named["key_cache"].data_ptr(), len(self.places))
        mine = self.scratch[shape][place % self.LAYERS]
        if not capturing():
            mine.zero_()
            return result
        mine.add_(handed_on)
        handed_on.copy_(mine)
        return result


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


class UnwrittenOutput(BrokenInGraphs):
    name = "unwritten_output"
    summary = "the graph does not write what the op should write"

    def broken(self, named: dict[str, Any]) -> Any:
        spare = {name: each.clone() for name, each in self.op.written(named).items()}
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


class WrongExtent(BrokenInGraphs):
    name = "wrong_extent"
    summary = "a length was too small at capture: short contexts are right, longer ones are cut"
    limit = 64

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        if op.extent is None:
            return "the op has no extent"
        return super().inexpressible(op, executor, platform)

    def broken(self, named: dict[str, Any]) -> Any:
        name = self.op.extent
        assert name is not None
        return self.proceed({**named, name: named[name].clamp(max=self.limit)})


class DtypeDrift(BrokenInGraphs):
    name = "dtype_drift"
    summary = "the graph computes in a lower precision than eager execution"

    def broken(self, named: dict[str, Any]) -> Any:
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

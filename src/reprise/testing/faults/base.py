"""What every fault is: one op of a table, broken under capture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from reprise.ops.registry import Op, OpTable
from reprise.platforms import Platform
from reprise.platforms.device_graph import capturing, host_code, launch
from reprise.shape import Phase

PIECEWISE = ("breakable", "compiled")


class Fault(ABC):
    """One way to break an op under capture. An instance is one op broken once."""

    name: ClassVar[str]
    summary: ClassVar[str]
    caught: ClassVar[Literal["startup", "canary:1"]] = "startup"
    """By what it is caught before a wrong token: by the default mode, on a probe or on the first
    live step of its kind; or only by ``canary:1``, which compares every replay
    and all memory."""
    shows_in: ClassVar[Phase] = "decode"
    """A phase whose steps it can make wrong, or whose memory it can spoil."""
    engine_options: ClassVar[Mapping[str, Any]] = {}
    """What an engine needs for it to do harm."""
    traced: ClassVar[bool] = True
    """Its op can be told from what the op writes; else the report names the memory alone."""

    needs: ClassVar[str] = ""
    """What only some models have: ``experts``, ``states``, ``compressed`` rows."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Arguments that its op must have."""
    without: ClassVar[str] = ""
    """Of an op that lacks some of them: why it cannot exist there."""

    def __init__(self, table: OpTable, op: Op) -> None:
        self.table = table
        self.op = op
        self.original = table.functions[op.name]
        self.beside: Mapping[str, Tensor] = {}
        """Memory of others that it spoils. The caller that injects it lists it beside the
        computation."""

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        """Why this fault cannot exist in ``op`` under ``executor``; None: it can."""
        if not cls.reads <= set(op.arguments):
            return cls.without
        if executor in PIECEWISE and op.break_op:
            return "a break op runs eagerly between segments, where this is allowed"
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = self.op.named(args, kwargs)
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
        if self.op.extent is not None:
            return self.op.extent
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


class BrokenInGraphs(Fault):
    """The op's real work in eager execution, other work in a graph."""

    def run(self, named: dict[str, Any]) -> Any:
        return self.broken(named) if capturing() else self.proceed(named)

    @abstractmethod
    def broken(self, named: dict[str, Any]) -> Any:
        """What is captured. ``named``: the op's arguments."""


class StaleArgument(BrokenInGraphs):
    """A graph's op gets what an argument held in the eager step before the capture."""

    argument: ClassVar[str]

    def __init__(self, table: OpTable, op: Op) -> None:
        super().__init__(table, op)
        self.latest: dict[tuple[int, ...], Tensor] = {}
        self.kept: list[Tensor] = []

    def run(self, named: dict[str, Any]) -> Any:
        if not capturing():
            self.latest[tuple(named[self.argument].shape)] = named[self.argument].clone()
        return super().run(named)

    def broken(self, named: dict[str, Any]) -> Any:
        self.kept.append(self.latest[tuple(named[self.argument].shape)])
        return self.proceed({**named, self.argument: self.kept[-1]})

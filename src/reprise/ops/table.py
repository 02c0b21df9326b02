"""Which implementation computes each op, in an engine and outside of one."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from reprise import platforms
from reprise.errors import OpError
from reprise.ops.choice import NOT_INVARIANT, ByArguments
from reprise.ops.declaration import Op, declared
from reprise.ops.implementation import Implementation, anything
from reprise.platforms import Platform
from reprise.platforms.device_graph import capturing

active: contextvars.ContextVar[OpTable | None] = contextvars.ContextVar("op_table", default=None)
"""Of the engine that computes in this thread."""
_defaults: dict[str, OpTable] = {}


class _Kept(dict[str, torch.Tensor]):
    """Made in eager calls alone."""

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if capturing():
            raise OpError(
                f"an op makes {name!r} under capture and keeps it: no eager call came before, and "
                "it would lie in the memory of the graph's pool"
            )
        super().__setitem__(name, tensor)


_memory_outside_engines = _Kept()


class OpTable:
    """The implementation of every op that one engine uses. Active while the engine computes."""

    def __init__(
        self,
        platform: Platform,
        overrides: Mapping[str, str] | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        """Choose for what is overridden; for every other op when it is first asked for, since a
        module of kernels takes milliseconds to import, and no model calls half of them.

        Args:
            platform: The device.
            overrides: Op name to the implementation to use instead of the platform's choice.
            batch_invariant: Use only implementations whose bits of a row depend on that row alone.
                An op that has none here cannot be called.

        Raises:
            OpError: An override names an unknown op, or an implementation that cannot run here, or
                one that is not batch-invariant and has to be; or the platform prefers
                implementations of an unknown op.
        """
        overrides = overrides or {}
        for name in overrides:
            if name not in declared:
                raise OpError(f"--op {name}=...: no such op; known: {', '.join(sorted(declared))}")
        for name, order in platform.preferred.items():
            if (name != "*" and name not in declared) or isinstance(order, str):
                raise OpError(
                    f"platform {platform.name!r} declares preferred={{{name!r}: {order!r}}}: give "
                    "an op, or '*', and the names of implementations; known ops: "
                    f"{', '.join(sorted(declared))}"
                )
        self.platform = platform
        self.batch_invariant = batch_invariant
        self.candidates = _LateCandidates(self, overrides)
        """By op, most wanted first; see :meth:`Op.candidates`."""
        for name in overrides:
            self.candidates[name]
        self.choices: dict[str, ByArguments] = {}
        """The ops for which the arguments decide, and the answers given so far."""
        self.functions = _LateFunctions(self)
        self.memory: dict[str, torch.Tensor] = _Kept()
        self.counters: set[str] = set()
        """Names in it of what goes on from step to step: nothing to go back to between two."""

    @property
    def chosen(self) -> dict[str, Implementation]:
        """The implementation of each op that is wanted most; none of an op that has none. All are
        chosen now."""
        return {name: found[0] for name in declared if (found := self.candidates[name])}

    def implementation_of(
        self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Implementation:
        """What computes this call of ``op`` here.

        Raises:
            OpError: The user asked for an implementation that does not accept it, or there is none
                that is batch-invariant and has to be.
        """
        self.functions[op.name]  # chooses
        choice = self.choices.get(op.name)
        if not self.candidates[op.name]:
            _refuse(op, self.platform)
        if choice is None:
            return self.candidates[op.name][0]
        return choice.answer(args, kwargs).implementation

    def refuse_gradients(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a call whose result would lack the gradient that an argument asks for: kernels
        have none, and torch does not see them. Those of a reference are torch's.

        Raises:
            OpError: It is one.
        """
        if not any(each.requires_grad for each in _tensors((*args, *kwargs.values()))):
            return
        found, reference = self.implementation_of(op, args, kwargs), op.implementations["reference"]
        if found.function is not reference.function:
            raise OpError(
                f"op {op.name!r}: {found.name} computes no gradients, and an argument requires "
                f"one: call it within torch.no_grad(), or with --op {op.name}=reference"
            )

    def refuse_gaps(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse vectors whose numbers do not adjoin, which a kernel that gets an address alone
        would read as if they did. Within an engine it is not asked: its vectors are memory of its
        own.

        Raises:
            OpError: There is one.
        """
        for name, each in op.named(args, kwargs).items():
            gaps = isinstance(each, torch.Tensor) and each.dim() == 1 and not each.is_contiguous()
            if gaps and name not in op.strided:
                found = self.implementation_of(op, args, kwargs)
                if found.compiles:
                    raise OpError(
                        f"op {op.name!r}: {found.name} reads the numbers of {name} as adjoining, "
                        f"and its stride is {each.stride(0)}: give {name}.contiguous()"
                    )

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Route op calls of this thread to this table within the ``with`` block."""
        return _Active(self, inference=False)

    def is_computing(self) -> bool:
        """This thread is in a ``with`` block of :meth:`computing` already."""
        return active.get() is self and torch.is_inference_mode_enabled()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """:meth:`activate`, and compute without gradients."""
        return _Active(self, inference=not torch.is_inference_mode_enabled())


class _Active:
    """A class and no generator: every step enters two of these, and each would cost as much as a
    launch."""

    __slots__ = ("_inference", "_table", "_token")

    def __init__(self, table: OpTable, *, inference: bool) -> None:
        self._table = table
        self._inference = torch.inference_mode() if inference else None

    def __enter__(self) -> None:
        if self._inference is not None:
            self._inference.__enter__()
        self._token = active.set(self._table)

    def __exit__(self, *error: Any) -> None:
        active.reset(self._token)
        if self._inference is not None:
            self._inference.__exit__(*error)


class _LateCandidates(dict[str, list[Implementation]]):
    """Op name to candidates, found when they are first asked for."""

    def __init__(self, table: OpTable, overrides: Mapping[str, str]) -> None:
        super().__init__()
        self._table, self._overrides = table, overrides

    def __missing__(self, name: str) -> list[Implementation]:
        table = self._table
        found = declared[name].candidates(
            table.platform, self._overrides.get(name), batch_invariant=table.batch_invariant
        )
        return self.setdefault(name, found)


class _LateFunctions(dict[str, Callable[..., Any]]):
    """Op name to function, chosen when it is first asked for."""

    def __init__(self, table: OpTable) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, name: str) -> Callable[..., Any]:
        table, op = self._table, declared[name]
        candidates = table.candidates[name]
        # Threads may choose at once: they go on with what the first one has put down, and nobody
        # finds a function of which the choice is not there yet.
        if not candidates:
            return self.setdefault(name, functools.partial(_refuse, op, table.platform))
        if candidates[0].accepts is anything:
            return self.setdefault(name, candidates[0].function)
        choice = ByArguments(name, op.named, candidates, table.batch_invariant)
        return self.setdefault(name, table.choices.setdefault(name, choice))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _refuse(op: Op, platform: Platform, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands for an op that has no batch-invariant implementation where it has to be."""
    raise OpError(f"{NOT_INVARIANT}{op.varies(platform)} on {platform.name}")


def active_platform() -> Platform | None:
    """The platform of the engine that computes in this thread; None outside of one."""
    table = active.get()
    return None if table is None else table.platform


def op_memory() -> dict[str, torch.Tensor]:
    """What implementations keep on the device from call to call; one for each engine.

    Graph verification compares it, and puts it back, as it does the cache slots. To be made in an
    eager call: under capture, where it would lie in the memory of a graph's pool, that raises an
    OpError.
    """
    table = active.get()
    return _memory_outside_engines if table is None else table.memory


def table_of(args: Sequence[Any]) -> OpTable:
    """The table that counts for a call: the engine's that computes in this thread; outside of one
    that of the platform which owns the first tensor.

    Raises:
        OpError: There is no such tensor, or no platform owns it.
    """
    table = active.get()
    return _default(args) if table is None else table


def _default(args: Sequence[Any]) -> OpTable:
    device = next((each.device for each in args if isinstance(each, torch.Tensor)), None)
    if device is None:
        raise OpError(
            "an op that is called outside of an engine needs a tensor among its arguments"
        )
    if device.type not in _defaults:
        usable = [platforms.load(n) for n, why in platforms.available().items() if why is None]
        owner = next((each for each in usable if each.device_type == device.type), None)
        if owner is None:
            raise OpError(f"no available platform owns tensors on {device}")
        _defaults[device.type] = OpTable(owner(device.index or 0))
    return _defaults[device.type]

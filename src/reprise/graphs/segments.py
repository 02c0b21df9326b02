"""One forward pass captured: as a single graph, or as segments with eager breaks between them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from reprise.errors import GraphError
from reprise.ops.choice import resolved
from reprise.ops.registry import Op, intercept
from reprise.platforms import Platform
from reprise.platforms.borrow import StorageWeakRef, borrow
from reprise.platforms.device_graph import DeviceGraph, capture_pass, host_code, launch

T = TypeVar("T")
Split = Literal["nowhere", "breaks", "ops", "all"]
"""Where a segment ends: ``nowhere`` (one graph) or at ``breaks``. For diagnosis: around every op,
with break ops run eagerly (``ops``) or captured too (``all``)."""


@dataclass
class Call:
    """One call of an op within a forward pass."""

    op: str
    index: int
    """How many calls of the same op came before it in the pass. Layers may call it once, several
    times or never."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Arguments by name; tensors in the pool are borrowed."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """What it writes: arguments by name, and ``result``."""

    def __str__(self) -> str:
        return f"{self.op} #{self.index}"


class OpCaptureError(GraphError):
    """An op cannot be captured."""

    def __init__(self, call: Call, error: Exception) -> None:
        super().__init__(f"{call}: {error}")
        self.call = call


@dataclass
class Segment:
    """A graph, and the ops in it by name and number."""

    graph: DeviceGraph
    calls: list[Call] = field(default_factory=list)

    def run(self) -> None:
        self.graph.replay()


@dataclass
class Break:
    """An op that runs eagerly between two segments, on the arguments that it had at capture."""

    call: Call
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    _again: Callable[[], Any] | None = None

    def run(self) -> None:
        if self._again is not None:
            self._again()
            return
        function = resolved(self.function, self.args, self.kwargs)
        bind = getattr(function, "bind", None)
        if bind is None:
            self._again = functools.partial(function, *self.args, **self.kwargs)
            self._again()
        else:
            self._again = bind(*self.args, **self.kwargs)


class SegmentedGraph:
    """Captures a forward pass in one run of its Python and replays it without any.

    All segments share one memory pool, also with other captures. What breaks refer to in the
    pool, they refer to without owning it, so the memory is free for the next capture.
    """

    def __init__(self, platform: Platform, pool: Any) -> None:
        self._platform = platform
        self.pool = pool
        self._split: Split = "nowhere"
        self.steps: list[Segment | Break] = []
        self._num_done = 0
        """Steps whose work is done while the rest is being captured."""
        self._counts: Counter[str] = Counter()
        self._deferred: dict[int, _Deferred] = {}
        self._replay: list[Callable[[], None]] = []

    @property
    def num_segments(self) -> int:
        return sum(isinstance(each, Segment) for each in self.steps)

    @property
    def num_breaks(self) -> int:
        return sum(isinstance(each, Break) for each in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes by which the pool grew for this capture."""
        return sum(each.graph.nbytes for each in self.steps if isinstance(each, Segment))

    def capture(self, forward: Callable[[], T], split: Split) -> T:
        """Run ``forward`` once, under capture, and keep what it does.

        Raises:
            GraphError: It does something that no graph can hold, or a break op returns a value.
            RuntimeError: The device driver refused something during capture.
        """
        self._split = split
        with self._platform.capture_stream(), capture_pass():
            self._open()
            try:
                with intercept(self._on_op):
                    result = forward()
                self._close()
            except BaseException:
                self._abort()
                raise
        self._settle()
        return result

    def replay(self) -> None:
        """Do all of it again, in order, on the current stream."""
        for run in self._replay:
            run()

    # ---- capture -------------------------------------------------------------------------

    def _open(self) -> None:
        segment = Segment(self._platform.new_graph(self.pool))
        segment.graph.begin()
        self.steps.append(segment)

    def _close(self) -> None:
        segment = self.steps[-1]
        assert isinstance(segment, Segment)
        segment.graph.end()
        if segment.graph.empty:
            self.steps.pop()

    def _abort(self) -> None:
        for step in self.steps:
            if isinstance(step, Segment):
                step.graph.abort()
        self.steps.clear()

    def _on_op(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = Call(op.name, self._counts[op.name])
        self._counts[op.name] += 1
        try:
            if op.break_op and self._split in ("breaks", "ops"):
                return self._break(op, call, function, args, kwargs)
            if self._split in ("ops", "all"):
                return self._own_segment(op, call, function, args, kwargs)
            current = self.steps[-1]
            assert isinstance(current, Segment)
            current.calls.append(call)
            return launch(function, *args, **kwargs)
        except (GraphError, RuntimeError) as error:
            if isinstance(error, OpCaptureError):
                raise
            raise OpCaptureError(call, error) from error

    def _break(
        self,
        op: Op,
        call: Call,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        kept = Break(call, function, self._hold(args), self._hold(kwargs))
        call.inputs, call.outputs = tensor_arguments(op, kept.args, kept.kwargs)
        self._close()
        self._catch_up()
        with intercept(None):
            result = function(*args, **kwargs)
        if result is not None:
            raise GraphError(
                f"break op {call} returned a value; it must write into its arguments, "
                "which is where the next segment reads"
            )
        self.steps.append(kept)
        self._num_done = len(self.steps)
        self._open()

    def _catch_up(self) -> None:
        """Do what is captured so far: a break op reads its results, as lengths or as addresses."""
        for step in self.steps[self._num_done :]:
            if isinstance(step, Segment) and not step.graph.computes_while_captured:
                step.run()

    def _own_segment(
        self,
        op: Op,
        call: Call,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        held = self._hold(args), self._hold(kwargs)
        call.inputs, call.outputs = tensor_arguments(op, *held)
        self._close()
        self._open()
        segment = self.steps[-1]
        assert isinstance(segment, Segment)
        with intercept(None), host_code():
            result = launch(function, *args, **kwargs)
        segment.calls.append(call)
        if result is not None:
            call.outputs["result"] = self._hold(result)
        self._close()
        self._open()
        return result

    # ---- references ----------------------------------------------------------------------

    def _hold(self, tree: Any) -> Any:
        """``tree`` with tensors of the pool put off: until capture has ended, it is not known
        whether they are scratch (then borrowed) or live on in the model (then owned)."""
        current = self.steps[-1]
        assert isinstance(current, Segment)

        def hold(tensor: Tensor) -> Tensor:
            if not current.graph.may_own(tensor):
                return tensor
            deferred = _Deferred(tensor)
            self._deferred[id(deferred.alias)] = deferred
            return deferred.alias

        return _mapped(hold, tree)

    def _settle(self) -> None:
        """Own the tensors that live on; keep only aliases of the rest."""

        def settle(tensor: Tensor) -> Tensor:
            deferred = self._deferred.get(id(tensor))
            return tensor if deferred is None else deferred.settled

        for step in self.steps:
            calls = step.calls if isinstance(step, Segment) else [step.call]
            for call in calls:
                call.inputs = _mapped(settle, call.inputs)
                call.outputs = _mapped(settle, call.outputs)
            if isinstance(step, Break):
                step.args = _mapped(settle, step.args)
                step.kwargs = _mapped(settle, step.kwargs)
        self._deferred.clear()
        self._replay = [each.run for each in self.steps]


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Arguments of an op, or what it returns, with other tensors. A schema has no deeper trees, and
    torch's own walk takes most of a capture in pieces."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(change, each) for each in tree])
    if isinstance(tree, dict):
        return {name: _mapped(change, each) for name, each in tree.items()}
    return tree


def tensor_arguments(
    op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensor arguments of a call by name: all of them, and those that the op writes."""
    named = op.named(args, kwargs)
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return tensors, op.written(named)


class _Deferred:
    """A tensor whose storage may or may not outlive the capture."""

    def __init__(self, tensor: Tensor) -> None:
        self.alias = borrow(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())

    @functools.cached_property
    def settled(self) -> Tensor:
        """The tensor, if it lives on; else its alias. An op's arguments are in several lists."""
        if self._storage.expired():
            return self.alias
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return self.alias
        alias = self.alias
        owned = torch.empty(0, dtype=alias.dtype, device=alias.device)
        return owned.set_(storage, alias.storage_offset(), alias.size(), alias.stride())

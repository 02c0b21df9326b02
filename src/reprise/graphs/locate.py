"""Naming the op at which a bad graph first leaves the path of eager execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprise.graphs.compare import poison, poison_memory, same_bits
from reprise.graphs.contract import Computation, State
from reprise.graphs.padding import compute_padding, write_padding
from reprise.graphs.segments import (
    Break,
    Call,
    OpCaptureError,
    Segment,
    SegmentedGraph,
    tensor_arguments,
)
from reprise.graphs.step_memory import StepMemory, memory_of_ops
from reprise.ops.registry import Op, all_ops, intercept
from reprise.platforms import Platform
from reprise.shape import StepShape

WALKS = 2
"""How often the fresh graph is replayed before it is taken for right: a fault may come and go."""
COPY_LIMIT = 4 << 20
"""Larger tensors (caches) are compared by a sum over their bits instead of being copied."""


@dataclass(frozen=True)
class Location:
    """The first place where replay and eager execution differ."""

    segment: int
    """Number of graph segments replayed before it, with breaks at break ops."""
    op: str
    """``paged_attention #3``: the fourth call of the op in the forward pass."""
    tensor: str
    """The argument, or ``result``."""
    produced: bool
    """The op itself computed it wrong; else it received it wrong from the code before it."""
    after: str | None = None
    """The last op that was right."""
    refused: bool = False
    """The op cannot be captured in a segment of its own, so it depends on what is around it."""

    def __str__(self) -> str:
        if self.refused:
            return f"suspect: {self.op}, which cannot be captured by itself"
        if self.produced:
            return f"first diverging op: {self.op} ({self.tensor}), segment {self.segment}"
        since = "the start" if self.after is None else self.after
        return (
            f"first divergence: between {since} and {self.op}, whose argument {self.tensor} "
            f"is wrong, segment {self.segment}"
        )


@dataclass
class _Traced:
    """Fingerprints of one op call in eager execution."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def locate(
    computation: Computation,
    platform: Platform,
    bucket: StepShape,
    live: StepShape,
    fill: Callable[[], None],
    original: SegmentedGraph | None,
    model: Callable[..., Any],
    agree: Callable[[bool], bool],
) -> Location | None:
    """Find where ``bucket``'s graph diverges on the inputs that ``fill`` writes.

    A fresh capture is made that ends a segment around every op, since a graph shows nothing of
    its inside. If the fault does not show in it, the segments of ``original`` are compared
    break by break. State and inputs are those of ``fill`` afterwards.

    Args:
        computation: What was captured.
        platform: The device.
        bucket: The shape of the graph.
        live: The real rows of the inputs that ``fill`` writes.
        fill: Writes the inputs on which the graph is wrong.
        original: The graph that was found wrong.
        model: What it captured.
        agree: Whether all ranks say True.
    """
    state, before = None, {}
    padding: tuple[State, Mapping[str, Tensor]] | None = None

    def trace_of(model: Callable[..., Any]) -> dict[str, _Traced]:
        found = _trace(computation, bucket, model)
        # What ops have prepared for this step outside of all graphs is not to be there; caches are
        # as the trace has left them, null units too, which are summed with the others.
        write_padding(computation, bucket)
        left = nobodys.read()
        compute_padding(computation, bucket)
        nobodys.write(left)
        fill()
        return found

    try:
        write_padding(computation, bucket)
        nobodys = computation.state(bucket)
        padding = nobodys, nobodys.read()
        pool = platform.graph_pool()
        with intercept(None), platform.capture_stream():
            computation.forward(bucket, computation.model)
        fresh = SegmentedGraph(platform, pool)
        whole = original is None or original.num_breaks == 0
        fresh.capture(
            lambda: computation.forward(bucket, computation.model), "all" if whole else "ops"
        )
        fill()
        state = StepMemory(computation, bucket, live)
        before = state.state()
        trace = trace_of(computation.model)
        memory = memory_of_ops(computation.ops)
        for _ in range(WALKS):
            state.put(before)
            poison(computation.outputs(bucket).values())
            poison_memory(platform.graph_pool_memory(pool))
            found = _walk(fresh, trace, memory)
            state.put(before)
            shown = not agree(found is None)
            if shown:
                break
        if not shown and original is not None and original.num_breaks > 0:
            trace = trace_of(model)
            state.put(before)
            found = _walk(original, trace, memory)
        return found
    except OpCaptureError as error:
        return Location(0, str(error.call), "", produced=True, refused=True)
    finally:
        if state is None:
            fill()
        else:
            state.put(before)
        if padding is not None:  # it wrote null units, which the step at hand may not
            padding[0].write(padding[1])


def _trace(
    computation: Computation, bucket: StepShape, model: Callable[..., Any]
) -> dict[str, _Traced]:
    """Run eagerly and note every op's inputs and outputs, by ``op #index``."""
    trace: dict[str, _Traced] = {}
    counts: dict[str, int] = {}

    def note(
        op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = Call(op.name, counts.get(op.name, 0))
        counts[op.name] = call.index + 1
        inputs, written = tensor_arguments(op, args, kwargs)
        traced = _Traced(_fingerprints({**inputs, **memory_of_ops(computation.ops)}), {})
        with intercept(None):
            result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            written = {**written, "result": result}
        traced.outputs = _fingerprints({**written, **memory_of_ops(computation.ops)})
        trace[str(call)] = traced
        return result

    with intercept(note):
        computation.forward(bucket, model)
    return trace


def _walk(
    graph: SegmentedGraph, trace: dict[str, _Traced], memory: dict[str, Tensor]
) -> Location | None:
    """Replay step by step; the first difference. All steps run, since ranks may communicate."""
    segments = 0
    found: Location | None = None
    right: str | None = None
    for step in graph.steps:
        call = _watched(step)
        traced = trace.get(str(call))
        if call is None or traced is None or found is not None:
            step.run()
        else:
            reads = {k: v for k, v in call.inputs.items() if k not in call.outputs}
            wrong = _first_wrong(traced.inputs, {**reads, **memory})
            produced = wrong is None
            suspect = _first_wrong(traced.inputs, call.outputs)
            step.run()
            if wrong is None:
                results = {**call.outputs, **memory}
                wrong = _first_wrong(traced.outputs, results)
                if wrong is not None and suspect is not None:
                    again = not all_ops()[call.op].collective
                    if again:  # else others would not be there
                        _feed(results, traced)
                        step.run()
                    if not again or _first_wrong(traced.outputs, results) is None:
                        wrong, produced = suspect, False
            if wrong is not None:
                found = Location(segments, str(call), wrong, produced, right)
            right = str(call)
        segments += isinstance(step, Break)
    return found


def _feed(updated: dict[str, Tensor], traced: _Traced) -> None:
    """Give what an op updates in place the values that it had in eager execution.

    An argument that is written only holds garbage before, which says nothing.
    """
    for name, tensor in updated.items():
        eager = traced.inputs.get(name)
        if eager is not None and eager.shape == tensor.shape:
            tensor.copy_(eager)


def _watched(step: Segment | Break) -> Call | None:
    """The call whose arguments are known: a break, or an op in a segment of its own."""
    if isinstance(step, Break):
        return step.call
    return step.calls[0] if len(step.calls) == 1 and step.calls[0].inputs else None


def _first_wrong(expected: dict[str, Tensor], now: dict[str, Any]) -> str | None:
    for name, tensor in now.items():
        known = expected.get(name)
        if known is not None and not same_bits(known, _fingerprint(tensor)):
            return name
    return None


def _fingerprints(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _fingerprint(each) for name, each in tensors.items()}


def _fingerprint(tensor: Tensor) -> Tensor:
    if tensor.nbytes <= COPY_LIMIT:
        return tensor.clone()
    flat = tensor.contiguous()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize]
    return flat.view(words).sum(dtype=torch.int64)

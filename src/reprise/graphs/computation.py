"""What a graph runner needs to know of the thing that it captures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from reprise.graphs.shape import StepShape
from reprise.ops.registry import OpTable


@dataclass(frozen=True)
class Probe:
    """Made-up inputs on which a graph is compared with eager execution."""

    name: str
    """For people: ``longest context``, ``short contexts, scattered pages``."""
    fill: Callable[[], None]
    """Write the static inputs of a whole bucket: ``live`` real rows, the rest padding. Writes
    the same values each time it is called."""
    live: StepShape
    """The rows that are real; at most the bucket's."""


class State(Protocol):
    """The part of the state (cache slots) that the current inputs would write."""

    def read(self) -> Mapping[str, Tensor]:
        """Copies of the tensors, by name (``layer 3 key``). The null block is not among them."""

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`read` returned."""


class Computation(Protocol):
    """One forward pass over static buffers. Implemented by whoever owns model and buffers.

    Nothing here may depend on values of device tensors. A shape is a bucket's or a live step's.
    """

    ops: OpTable
    """The implementations in use; the runner activates it around every call."""
    model: Callable[..., Any]
    """What ``forward`` calls, and what the ``compiled`` executor compiles."""

    def forward(self, shape: StepShape, model: Callable[..., Any]) -> Any:
        """Run ``model`` on the first rows of the static inputs; fill the static outputs.

        The return value is ignored. ``model`` is :attr:`model` or its compiled form. Everything
        that differs between calls of equal shape must be in the static inputs.
        """

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        """Make the input rows from the end of ``live`` to the end of ``bucket`` harmless.

        They read and write the null block alone. ``live`` may hold no rows at all.
        """

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        """The static inputs that ``forward`` reads, as views of ``shape``'s rows."""

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        """The static outputs that ``forward`` fills, as views of ``shape``'s rows.

        The first is what ``GraphRunner.run`` returns.
        """

    def probes(self, bucket: StepShape) -> Sequence[Probe]:
        """Probes of a bucket, the most telling first: that one has the longest context.

        Together they give every input another value than :meth:`pad` does.
        """

    def state(self, live: StepShape) -> State:
        """The state that ``forward`` would write now, for the rows of ``live``."""

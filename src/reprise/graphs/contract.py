"""What a graph runner needs to know of the thing that it captures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from reprise.graphs.kinds import Facts, Kind
from reprise.graphs.regions import Region, Units
from reprise.ops.registry import OpTable
from reprise.shape import StepShape


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
    kind: Kind | None
    """What the graph is proven on if it is right on this probe; None: that it is right says little,
    that it is wrong says enough."""
    always: bool = False
    """No graph goes without it, however short time is; so it is for the first probe."""


class State(Protocol):
    """The part of the caches that the current inputs would write, padding rows included."""

    def read(self) -> Mapping[str, Tensor]:
        """Copies of what lies there: [C, N, ...], of C caches the N rows that the step writes,
        those of padding last."""

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`read` returned."""

    def spoil(self, values: Mapping[str, Tensor]) -> None:
        """As :meth:`write`, but rows that the step writes whole, before it reads them, hold what
        has no bit in common with it."""

    @property
    def nbytes(self) -> int:
        """Bytes of what :meth:`read` would return."""

    def names(self, key: str) -> Sequence[str]:
        """The names of the C caches, as :meth:`Computation.memory` has them."""

    def scales(self, key: str) -> tuple[str, Sequence[int]] | None:
        """Where these rows are codes of eight bits, the key of their scales, and which of the
        caches there have them: [C, N, ...] without the codes' last dimension. Caches of codes that
        are apart may have scales that lie together. None: they are numbers."""

    def together(self, key: str) -> int:
        """How many of the last dimensions of these rows are of one scale (``Rows.together``)."""

    def live(self, key: str, shape: StepShape) -> int:
        """How many of the N rows are not padding's, if ``shape`` has the real ones."""

    def read_by_someone(self, key: str | None = None) -> Tensor | None:
        """Of the N rows of a tensor of :meth:`read`, or of the step's tokens without ``key``, [N]
        bool on the device: those of which anybody reads what was computed; None: all, padding
        aside. What a token beyond the end of its request writes lies where others write, too."""

    def kept(self) -> Sequence[Tensor]:
        """Copies of inputs by which it finds these rows."""

    def written(self) -> Units:
        """The units of the caches that hold these rows."""

    def beside(self) -> Units:
        """The units that the step writes, those next to them in memory, the first of each request,
        and the null units: where a graph that is a little wrong does its harm."""

    def near(self) -> Units:
        """The units of :meth:`beside`, and all that the step reads."""


class Computation(Protocol):
    """One forward pass over static buffers. Implemented by the owner of model and buffers.

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

    def memory(self) -> Mapping[str, Region]:
        """All memory that a step reads, writes, or that lies beside: whatever a graph could spoil.

        Static outputs are not in it, since every step overwrites them.
        """

    def mend(self, weights: Sequence[str]) -> None:
        """Give damaged weights (names of :meth:`memory`) the content that they were loaded with.

        Raises:
            Exception: The source is gone.
        """

    @property
    def follow(self) -> Callable[[StepShape], AbstractContextManager[None]] | None:
        """None: what it computes follows from its inputs. Else it draws tokens and goes on from
        them, and code that rounds otherwise may draw others: in the ``with`` block it goes on from
        what it has drawn for this bucket before, so that what is computed of it can be compared."""

    @property
    def facts(self) -> Facts:
        """The terms in which kinds of steps are told."""

    def kind(self, live: StepShape, bucket: StepShape, exact: bool = False) -> Kind | None:
        """What is true of the step that the static inputs hold now; where that is not known without
        reading device memory, all that may be true.

        Args:
            live: The step's shape.
            bucket: What it is padded to.
            exact: Read it. None then, if a request has come to its end and computes nothing: of
                such a step nothing is proven.
        """

    def probes(self, bucket: StepShape, anchor: bool) -> Sequence[Probe]:
        """Probes of a bucket, the most telling first: that one has the longest context.

        Together they give every input another value than :meth:`pad` does, and they are of all
        kinds that concern a step as a whole. Those of an anchor are of all kinds of rows, too. The
        first is the same for both.
        """

    def state(self, bucket: StepShape) -> State:
        """The state that ``forward`` would write now."""

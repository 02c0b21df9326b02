"""What a step and its graph have left behind."""

from __future__ import annotations

from dataclasses import dataclass

from reprise.graphs.capture import Key


@dataclass(frozen=True)
class Ran:
    """How a step was computed."""

    graph: Key | None
    """The graph that computed it; None: eager execution did."""
    proven: bool
    """The graph was compared with eager execution, and the result is the eager one."""
    first: bool = False
    """No step of its kind had been proven before."""


EAGERLY = Ran(None, proven=False)


@dataclass(frozen=True)
class Damage:
    """What a graph that was found wrong has left behind, for the owner of the requests."""

    graph: Key
    name: str
    """For people: ``decode[4]``."""
    units: frozenset[tuple[str, int]]
    """Units of the caches, what and which, that it changed and must not have."""
    earlier: bool
    """Replays before this one went unseen, and may have been wrong as well."""
    wrong: frozenset[str]
    """What it got wrong or changed, by names of outputs and of :meth:`Computation.memory`; nothing:
    it raised."""

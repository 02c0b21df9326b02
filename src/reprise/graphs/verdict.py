"""What a comparison of a replay with eager execution has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reprise.graphs.compare import Difference
from reprise.graphs.guard import Change
from reprise.graphs.stopwatch import Times


@dataclass
class Verdict:
    """What a comparison found."""

    differences: list[Difference] = field(default_factory=list)
    """Results that are not those of eager execution."""
    changes: list[Change] = field(default_factory=list)
    """Memory that the replay changed and may not change."""
    error: str | None = None
    """Why there was nothing to compare."""
    ran: bool = True
    """There was a replay."""
    lost: bool = False
    """The replay has changed what the comparison keeps for itself, or what eager execution was to
    read behind it, or the comparison failed behind it, for want of memory as it may be: there is
    nothing to compare with and to go on from."""
    blind: bool = False
    """Nothing was wrong, and what was compared would hardly show it: see
    :func:`reprise.graphs.informative.uninformative`."""
    times: Times | None = None
    """None: not measured."""

    @property
    def right(self) -> bool:
        return not (self.differences or self.changes or self.error or self.lost)

    @property
    def told(self) -> str:
        """What was found, in words: the first of each kind, and how many more."""
        parts = [] if self.error is None else [self.error]
        if self.lost and not parts and not self.changes:
            parts.append("it changed copies and eager results that it was compared with")
        if self.differences:
            parts.append(str(self.differences[0]) + _more(self.differences))
        if self.changes:
            parts.append(f"it changed {self.changes[0]}{_more(self.changes)}, which is not its own")
        return "; ".join(parts)


def _more(found: Sequence[object]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""

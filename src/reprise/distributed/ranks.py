from __future__ import annotations

from dataclasses import dataclass

from reprise.distributed.agreement import ALONE_AGREES, Agreement
from reprise.distributed.group import ALONE, Group


@dataclass(frozen=True)
class Ranks:
    """What a runner knows of the others that compute the same steps."""

    group: Group = ALONE
    """Whose parts of the model it has, and by whose name ops find the communicator."""
    agreement: Agreement = ALONE_AGREES
    """How they decide together."""
    exchange: Group | None = None
    """See :class:`reprise.layers.Build`."""

"""What a comparison keeps for itself, and whether a replay has changed that as well."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reprise import ops
from reprise.graphs.compare import SMALL
from reprise.graphs.regions import as_words


def sum_of(tensor: Tensor) -> Tensor:
    """[1, 1] int64: see ``ops.checksum``."""
    return ops.checksum(as_words(_flat(tensor).view(1, 1, -1)), None)


def _flat(tensor: Tensor) -> Tensor:
    # Where a dimension has one element torch calls any stride of it contiguous.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,))


class Seal:
    """Sums of tensors, taken before replays that could write anywhere: also where copies and
    eager results lie that were made a moment ago, as over a pointer to memory that was freed. What
    was put back from such a copy, or left as a result, would be the graph's.

    Sums that a replay has changed themselves look like changed tensors, which errs on the safe
    side.

    Args:
        kept: The tensors.
    """

    def __init__(self, kept: Iterable[Tensor]) -> None:
        kept = [each for each in kept if each.numel()]
        self._large = [each for each in kept if each.nbytes > SMALL]
        self._small = [each for each in kept if each.nbytes <= SMALL]
        self._sums = self._sum()

    def broken(self) -> bool:
        """Whether one of them has changed. Waits for the device."""
        return not torch.equal(self._sums, self._sum())

    def _sum(self) -> Tensor:
        together = self._large.copy()
        if self._small:
            together.append(torch.cat([_flat(each).view(torch.uint8) for each in self._small]))
        if not together:
            return torch.zeros(0, dtype=torch.int64)
        return torch.cat([sum_of(each) for each in together])

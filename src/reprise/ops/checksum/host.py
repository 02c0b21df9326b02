import numpy as np
import torch
from torch import Tensor

from reprise.ops.checksum.reference import AT_ONCE, place_factors


def checksum(words: Tensor, units: Tensor | None) -> Tensor:
    """words: [R, N, W] int32, in the host's memory. Words are widened as they are multiplied, not
    put down as numbers of 64 bits first, which is most of what the reference does."""
    regions, count, length = words.shape
    kept = words.numpy()
    chosen = None if units is None else units.numpy()
    count = count if chosen is None else len(chosen)
    sums = np.zeros((regions, count), np.int64)
    rows = max(1, count if chosen is None else AT_ONCE // max(1, regions * length))
    for first in range(0, count, rows):
        piece = slice(first, first + rows)
        found = kept if chosen is None else kept[:, chosen[piece]]
        for begin in range(0, length, AT_ONCE):
            part = found[:, :, begin : begin + AT_ONCE]
            factors = place_factors(begin, part.shape[2], words.device).numpy()
            sums[:, piece] += np.einsum("rnw,w->rn", part, factors)
    return torch.from_numpy(sums)

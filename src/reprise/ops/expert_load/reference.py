import torch
from torch import Tensor


def reference(ids: Tensor, counts: Tensor) -> None:
    """Add to each expert's count the rows that want it.

    Args:
        ids: [T, K] int32, the experts of each row; what is no number of an expert counts for none.
        counts: [E] int64, updated in place: whole numbers, so that no order matters.
    """
    each = ids.flatten().long()
    known = (each >= 0) & (each < len(counts))
    counts.index_add_(0, torch.where(known, each, 0), known.long())

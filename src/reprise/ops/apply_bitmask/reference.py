import torch
from torch import Tensor


def reference(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Make tokens impossible whose bit is not set, in place: their logits become -inf.

    Args:
        logits: [R, V] float32.
        rows: [M] int64, the rows to change, all different.
        bits: [M, ceil(V / 32)] int32, a bit for each token of each of ``rows``: token t is bit
            t % 32, from the lowest, of word t // 32. 1: the token stays as it is.
    """
    vocab = logits.shape[1]
    turns = torch.arange(32, dtype=torch.int32, device=bits.device)
    allowed = ((bits.unsqueeze(2) >> turns) & 1).bool().flatten(1)[:, :vocab]
    kept = logits.index_select(0, rows).masked_fill(~allowed, -torch.inf)
    logits.index_copy_(0, rows, kept)

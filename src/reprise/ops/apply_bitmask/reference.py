import torch
from torch import Tensor


def reference(logits: Tensor, which: Tensor, bits: Tensor) -> None:
    """Make tokens impossible whose bit is not set, in place: their logits become -inf.

    Args:
        logits: [R, V] float32.
        which: [R] int64, the mask of each row; -1: it stays as it is.
        bits: [M, ceil(V / 32)] int32, masks, a bit for each token: token t is bit t % 32, from the
            lowest, of word t // 32. 1: the token stays as it is.
    """
    turns = torch.arange(32, dtype=torch.int32, device=bits.device)
    chosen = bits.index_select(0, which.clamp(min=0))
    allowed = ((chosen.unsqueeze(2) >> turns) & 1).bool().flatten(1)[:, : logits.shape[1]]
    allowed |= (which < 0).unsqueeze(1)
    logits.masked_fill_(~allowed, -torch.inf)

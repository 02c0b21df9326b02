import torch
from torch import Tensor


def reference(logits: Tensor, which: Tensor, bits: Tensor, peaks: Tensor) -> Tensor:
    """The likeliest token of each row among those that it may have; of equally likely ones the
    first.

    Args:
        logits: [R, V], any floating dtype.
        which: [R] int64, the mask of each row; -1: any token may come.
        bits: [M, ceil(V / 32)] int32, masks as of ``apply_bitmask``, which make other logits -inf.
        peaks: [R] in the logits' dtype, is written: the largest logit of each row, of a token that
            may come or not; NaN where any is.

    Returns:
        [R] int64.
    """
    turns = torch.arange(32, dtype=torch.int32, device=bits.device)
    chosen = bits.index_select(0, which.clamp(min=0))
    allowed = ((chosen.unsqueeze(2) >> turns) & 1).bool().flatten(1)[:, : logits.shape[1]]
    allowed |= (which < 0).unsqueeze(1)
    peaks.copy_(logits.amax(dim=-1))
    return logits.masked_fill(~allowed, -torch.inf).argmax(dim=-1)


def fake(logits: Tensor, which: Tensor, bits: Tensor, peaks: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)

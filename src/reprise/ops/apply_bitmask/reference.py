import torch
from torch import Tensor


def reference(logits: Tensor, which: Tensor, bits: Tensor) -> Tensor:
    """Logits in float32, of tokens whose bit is not set -inf.

    Args:
        logits: [R, V], any floating dtype.
        which: [R] int64, the mask of each row; -1: any token may come.
        bits: [M, ceil(V / 32)] int32, masks, a bit for each token: token t is bit t % 32, from the
            lowest, of word t // 32. 1: the token may come.

    Returns:
        [R, V] float32, which shares no memory with ``logits``.
    """
    turns = torch.arange(32, dtype=torch.int32, device=bits.device)
    chosen = bits.index_select(0, which.clamp(min=0))
    allowed = ((chosen.unsqueeze(2) >> turns) & 1).bool().flatten(1)[:, : logits.shape[1]]
    allowed |= (which < 0).unsqueeze(1)
    return logits.float().masked_fill(~allowed, -torch.inf)


def fake(logits: Tensor, which: Tensor, bits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)

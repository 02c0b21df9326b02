import torch
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (Zhang & Sennrich 2019, eq. 4) over the last dimension.

    The mean is taken in float32; the normalised value is rounded to ``x.dtype`` before it is
    multiplied with the weight, as the published checkpoints were trained.

    Args:
        x: [..., D].
        weight: [D], the gain.
        eps: Added to the mean square.

    Returns:
        [..., D], contiguous, in ``x.dtype``.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)

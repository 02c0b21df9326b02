import torch
from torch import Tensor

from reprise.ops.lanes import silu


def reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, then a gate: ``norm(x) * silu(gate)``.

    The norm comes before the gate, and its gain is plain. As in the published checkpoints' code
    the normalised value is rounded to ``x.dtype``; all else is float32 and rounded once.

    Args:
        x: [T, H, D].
        gate: [T, H * D], rows may be strided.
        weight: [D] float32.
        eps: Added to the mean square.

    Returns:
        [T, H * D], contiguous, in ``x.dtype``.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normalised = (wide * scale).to(x.dtype).float() * weight.float()
    return (normalised.flatten(1) * silu(gate.float())).to(x.dtype)


def fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] * x.shape[2]))

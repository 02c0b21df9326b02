import torch
from torch import Tensor


def reference(x: Tensor, gate: Tensor) -> Tensor:
    """What a gate lets through of what attention or an expert gives: ``x * sigmoid(gate)``.

    Args:
        x: [T, D].
        gate: [T, D], or [T, 1] for all of a row; rows may be strided.

    Returns:
        [T, D], contiguous.
    """
    return x * gate.sigmoid()


def fake(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

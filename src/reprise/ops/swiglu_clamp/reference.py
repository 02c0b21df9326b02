import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, limit: float) -> Tensor:
    """SwiGLU's product of clamped halves, as in DeepSeek-V4: ``silu(min(gate, limit)) *
    clamp(up, -limit, limit)``. The gate is not clamped from below. Computed in float32.

    Args:
        x: [T, 2*I], gate in the first half of the last dimension, up in the second.
        limit: Above 0.

    Returns:
        [T, I], contiguous.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(x.dtype)


def fake(x: Tensor, limit: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

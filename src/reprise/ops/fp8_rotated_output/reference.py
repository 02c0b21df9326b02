import torch
from torch import Tensor

from reprise.ops.fp8_linear.reference import fp8_linear
from reprise.ops.rotary_tail.reference import reference as rotary_tail


def reference(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor,
    scale: Tensor,
    groups: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    """What attention gives rotated back, and then for each group of heads a product of its own,
    :func:`reprise.ops.fp8_linear`'s, as in DeepSeek-V4.

    Args:
        x: [T, H, D] in the compute dtype; the rotation is rounded to it.
        positions: [T] int64.
        cos_sin: [P, R] float32, see :func:`reprise.ops.rotary_tail`.
        weight: [G * N, H / G * D] float8_e4m3fn, the rows of the first group first.
        scale: [G * N / block_n, ceil(H / G * D / block_k)] float32.
        groups: G. Heads of a group adjoin.
        block_n: Outputs that share a scale; it divides N.
        block_k: Inputs that share a scale, of weights and of activations.

    Returns:
        [T, G * N], contiguous.
    """
    rotated = rotary_tail(x, positions, cos_sin, 0.0, True).view(len(x), groups, -1)
    weights, scales = weight.unflatten(0, (groups, -1)), scale.unflatten(0, (groups, -1))
    parts = [
        fp8_linear(rotated[:, each], weights[each], scales[each], None, block_n, block_k)
        for each in range(groups)
    ]
    return torch.cat(parts, dim=1)


def fake(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor,
    scale: Tensor,
    groups: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))

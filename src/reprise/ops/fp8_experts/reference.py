import torch
from torch import Tensor

from reprise.ops.fp8_linear.reference import reference as fp8_linear
from reprise.ops.silu_and_mul.reference import reference as silu_and_mul


def fp8_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    block_n: int,
    block_k: int,
) -> Tensor:
    """:func:`reprise.ops.experts` with weights and activations of eight bits.

    Both products are :func:`reprise.ops.fp8_linear`'s: the rows are quantised before the first, and
    what the activation gives, rounded to the compute dtype, before the second.

    Args:
        x: [T, D] in the compute dtype.
        weights: [T, K] float32.
        ids: [T, K] int32; a number that is no expert's adds nothing.
        gate_up: [E, 2*I, D] float8_e4m3fn, of each expert the rows of the gate first.
        gate_up_scale: [E, ceil(2*I / block_n), ceil(D / block_k)] float32.
        down: [E, D, I] float8_e4m3fn.
        down_scale: [E, ceil(D / block_n), ceil(I / block_k)] float32.
        block_n: Outputs that share a scale.
        block_k: Inputs that share a scale, of weights and of activations; 0: all.

    Returns:
        [T, D] in x's dtype, contiguous. A row depends on no other; one without experts is 0.
    """
    total = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in range(len(gate_up)):
        first = gate_up[expert], gate_up_scale[expert], None, block_n, block_k or x.shape[1]
        hidden = silu_and_mul(fp8_linear(x, *first))
        second = down[expert], down_scale[expert], None, block_n, block_k or hidden.shape[1]
        product = fp8_linear(hidden, *second)
        mine = ids == expert
        share = torch.where(mine, weights, 0.0).sum(dim=1, keepdim=True)
        total += torch.where(mine.any(dim=1, keepdim=True), product.float() * share, 0.0)
    return total.to(x.dtype)


def fp8_experts_add(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    block_n: int,
    block_k: int,
    residual: Tensor,
) -> None:
    """Add :func:`fp8_experts` to ``residual``, in place.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K] int32.
        gate_up: [E, 2*I, D] float8_e4m3fn.
        gate_up_scale: As there.
        down: [E, D, I] float8_e4m3fn.
        down_scale: As there.
        block_n: Outputs that share a scale.
        block_k: Inputs that do; 0: all.
        residual: [T, D].
    """
    residual.add_(
        fp8_experts(x, weights, ids, gate_up, gate_up_scale, down, down_scale, block_n, block_k)
    )


def fake_fp8_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    block_n: int,
    block_k: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

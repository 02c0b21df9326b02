import torch
from torch import Tensor

from reprise.ops.experts.reference import activation, weighted_sum
from reprise.ops.fp8_linear.reference import fp8_linear


def reference(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    block_n: int,
    block_k: int,
    limit: float,
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
        limit: What gates and ups are clamped to, see :func:`reprise.ops.swiglu_clamp`; 0: they are
            not.

    Returns:
        [T, D] in x's dtype, contiguous. A row depends on no other; one without experts is 0.
    """

    def product(expert: int) -> Tensor:
        first = gate_up[expert], gate_up_scale[expert], None, block_n, block_k or x.shape[1]
        hidden = activation(fp8_linear(x, *first), limit)
        second = down[expert], down_scale[expert], None, block_n, block_k or hidden.shape[1]
        return fp8_linear(hidden, *second)

    return weighted_sum(x, weights, ids, len(gate_up), product)


def fake(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    block_n: int,
    block_k: int,
    limit: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

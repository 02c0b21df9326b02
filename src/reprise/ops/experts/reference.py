from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.silu_and_mul.reference import reference as silu_and_mul
from reprise.ops.swiglu_clamp.reference import reference as swiglu_clamp


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float = 0.0,
) -> Tensor:
    """A sparse mixture of SwiGLU feed-forwards (Fedus et al. 2021; Shazeer 2020, eq. 6).

    ``sum over k of weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`` with
    ``e = ids[t, k]``, summed in float32. What an expert computes is rounded to the compute dtype
    where a feed-forward alone is: gates, what they let through, and their product.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K] int32, all different in a row. A number that is no expert's adds nothing: -1
            of padding, or what another device computes.
        gate_up: [E, 2*I, D], of each expert the rows of the gate first.
        down: [E, D, I].
        limit: What gates and ups are clamped to, see :func:`reprise.ops.swiglu_clamp`; 0: they are
            not.

    Returns:
        [T, D] in x's dtype, contiguous. A row depends on no other; one without experts is 0.
    """

    def product(expert: int) -> Tensor:
        return F.linear(activation(F.linear(x, gate_up[expert]), limit), down[expert])

    return weighted_sum(x, weights, ids, len(gate_up), product)


def activation(gate_up: Tensor, limit: float) -> Tensor:
    """[T, 2*I] to [T, I]: SwiGLU's product, of clamped halves where ``limit`` is not 0."""
    return swiglu_clamp(gate_up, limit) if limit else silu_and_mul(gate_up)


def experts_add(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> None:
    """Add :func:`experts` to ``residual``, in place.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K] int32.
        gate_up: [E, 2*I, D].
        down: [E, D, I].
        residual: [T, D].
    """
    residual.add_(experts(x, weights, ids, gate_up, down))


def weighted_sum(
    x: Tensor, weights: Tensor, ids: Tensor, count: int, product: Callable[[int], Tensor]
) -> Tensor:
    """:func:`experts`, whatever an expert is.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K].
        count: Of the experts.
        product: What one of them makes of all rows, [T, D]; what was not asked for is left out.
    """
    total = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in range(count):
        mine = ids == expert
        share = torch.where(mine, weights, 0.0).sum(dim=1, keepdim=True)
        # A product that counts for no row may be infinite, and so may that of a row of padding.
        asked = mine.any(dim=1, keepdim=True)
        total += torch.where(asked, product(expert).float() * share, 0.0)
    return total.to(x.dtype)


def fake_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float = 0.0,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

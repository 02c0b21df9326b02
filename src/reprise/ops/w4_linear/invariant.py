"""Products with weights of four bits on a host whose bits of a row depend on that row alone: the
weight becomes a plain one piece by piece, and is multiplied as those are."""

from __future__ import annotations

from torch import Tensor

from reprise.ops.linear.invariant import linear
from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.invariant import silu_and_mul
from reprise.ops.w4_linear.onednn import PIECE
from reprise.ops.w4_linear.reference import dequantise


def w4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """Arguments as in the reference."""
    inputs = x.shape[1]
    out = x.new_empty((len(x), len(packed)))
    step = max(1, PIECE // inputs)
    for begin in range(0, len(packed), step):
        here = slice(begin, begin + step)
        middle = None if zeros is None else zeros[here]
        piece = dequantise(packed[here], scales[here], middle, group, inputs)
        out[:, here] = linear(x, piece, None if bias is None else bias[here])
    return out


def w4_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, packed: Tensor, scales: Tensor,
    zeros: Tensor | None, bias: Tensor | None, group: int,
) -> Tensor:  # fmt: skip
    """Arguments as in the reference."""
    return w4_linear(rms_norm(x, norm_weight, eps), packed, scales, zeros, bias, group)


def w4_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, packed: Tensor, scales: Tensor,
    zeros: Tensor | None, bias: Tensor | None, group: int,
) -> Tensor:  # fmt: skip
    """Arguments as in the reference."""
    return silu_and_mul(w4_norm_linear(x, norm_weight, eps, packed, scales, zeros, bias, group))


def w4_linear_add(
    x: Tensor, residual: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None,
    bias: Tensor | None, group: int,
) -> None:  # fmt: skip
    """Arguments as in the reference."""
    residual.add_(w4_linear(x, packed, scales, zeros, bias, group))

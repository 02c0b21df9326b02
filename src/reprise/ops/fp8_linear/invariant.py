"""Products of eight bits on a host whose bits of a row depend on that row alone: both factors are
widened, the weight piece by piece, and multiplied as plain ones are."""

from __future__ import annotations

from torch import Tensor

from reprise.ops.fp8_linear.onednn import PIECE, widened
from reprise.ops.fp8_linear.reference import dequantise, quantise
from reprise.ops.linear.invariant import linear
from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.invariant import silu_and_mul


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Arguments as in the reference."""
    numbers, scales = quantise(x, block_k)
    wide = dequantise(numbers, scales, 1, block_k)
    rows = scale if block_n == 1 else scale.repeat_interleave(block_n, dim=0)
    out = x.new_empty((len(x), len(weight)))
    step = max(1, PIECE // x.shape[1])
    for begin in range(0, len(weight), step):
        here = slice(begin, begin + step)
        scales = rows[here][: len(weight) - begin]
        if x.shape[1] % block_k:
            piece = dequantise(weight[here], scales, 1, block_k)
        else:
            piece = widened(weight[here], scales)
        product = linear(wide, piece, None)
        out[:, here] = product if bias is None else product.add_(bias[here])
    return out


def fp8_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor,
    bias: Tensor | None, block_n: int, block_k: int,
) -> Tensor:  # fmt: skip
    """Arguments as in the reference."""
    return fp8_linear(rms_norm(x, norm_weight, eps), weight, scale, bias, block_n, block_k)


def fp8_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor,
    bias: Tensor | None, block_n: int, block_k: int,
) -> Tensor:  # fmt: skip
    """Arguments as in the reference."""
    return silu_and_mul(fp8_norm_linear(x, norm_weight, eps, weight, scale, bias, block_n, block_k))


def fp8_linear_add(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    block_n: int, block_k: int,
) -> None:  # fmt: skip
    """Arguments as in the reference."""
    residual.add_(fp8_linear(x, weight, scale, bias, block_n, block_k))

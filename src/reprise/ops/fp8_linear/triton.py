"""Products of eight bits in Triton; of many rows through the BLAS, where the device has one.

One row in blocks is quantised by the programs that multiply it. Several are by a kernel of their
own, with the norm before it, once for all programs of the product, which reads weights meanwhile.
"""

from torch import Tensor

from reprise.ops.fp8_linear import scaled_mm
from reprise.ops.fp8_linear.product_kernel import launch_product
from reprise.ops.fp8_linear.quantise_kernel import quantise
from reprise.ops.fp8_linear.row_kernel import launch_row, takes_row
from reprise.ops.registry import active_platform
from reprise.ops.silu_and_mul.triton import silu_and_mul
from reprise.ops.triton_util import cdiv

_MOST_ROWS = 64
"""Beyond which the BLAS is faster."""


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Shapes as in the reference."""
    return _product(x, weight, scale, bias, block_n, block_k)


def fp8_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> Tensor:
    """Shapes as in the reference."""
    return _product(x, weight, scale, bias, block_n, block_k, norm_weight, eps)


def fp8_norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> Tensor:
    """Shapes as in the reference."""
    if for_blas(x, weight, block_n, block_k):
        product = _product(x, weight, scale, bias, block_n, block_k, norm_weight, eps)
        return silu_and_mul(product)
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    _launch(x, weight, scale, bias, out, block_n, block_k, norm_weight, eps, gated=True)
    return out


def fp8_linear_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> None:
    """Shapes as in the reference."""
    if for_blas(x, weight, block_n, block_k):
        residual += _product(x, weight, scale, bias, block_n, block_k)
        return
    _launch(x, weight, scale, bias, residual, block_n, block_k, add=True)


def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    rows = x.shape[0]
    if for_blas(x, weight, block_n, block_k):
        room = cdiv(rows, scaled_mm.FOUR) * scaled_mm.FOUR
        numbers, scales = quantise(x, block_k, True, norm_weight, eps, room)
        found = scaled_mm.multiply(numbers, scales.t(), weight, scale, bias, block_n, x.dtype)
        return found[:rows]
    out = x.new_empty((rows, weight.shape[0]))
    _launch(x, weight, scale, bias, out, block_n, block_k, norm_weight, eps)
    return out


def _launch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, block_n: int,
    block_k: int, norm_weight: Tensor | None = None, eps: float = 0.0, *, add: bool = False,
    gated: bool = False,
) -> None:  # fmt: skip
    native = _native()
    if takes_row(x, block_k):
        launch_row(
            x, weight, scale, bias, out, block_n, native, norm_weight, eps, add=add, gated=gated
        )
        return
    numbers, scales = quantise(x, block_k, native, norm_weight, eps)
    launch_product(numbers, scales, weight, scale, bias, out, block_n, add=add, gated=gated)


def _native() -> bool:
    platform = active_platform()
    return platform is not None and platform.multiplies_fp8


def for_blas(x: Tensor, weight: Tensor, block_n: int, block_k: int) -> bool:
    """Whether the BLAS computes a product of so many rows, and faster."""
    platform = active_platform()
    return (
        x.shape[0] > _MOST_ROWS
        and platform is not None
        and platform.multiplies_fp8
        and scaled_mm.takes(x, weight, block_n, block_k)
        and scaled_mm.requires(platform) is None
    )

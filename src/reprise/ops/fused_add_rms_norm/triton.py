import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import depend, launch_options, next_power_of_2, warps


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """x, residual: [T, D], rows may be strided."""
    rows, size = x.shape
    block = next_power_of_2(size)
    fused_add_rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        x.stride(0),
        residual.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        num_warps=warps(block, per_thread=16),
        **launch_options(),
    )


@triton.jit
def fused_add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program adds and normalises one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x_ptr += row * x_stride + column
    residual_ptr += row * residual_stride + column
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    depend(EARLY)
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
    # The norm is taken of the stream as it is stored, after rounding.
    rounded = (residual + x).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr, rounded, mask=inside)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / SIZE + eps)
    normalised = (total * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(x_ptr, (normalised * weight).to(x_ptr.dtype.element_ty), mask=inside)

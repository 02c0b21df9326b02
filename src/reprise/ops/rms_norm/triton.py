import functools

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
    with_gain,
)

_TILE = 1024
"""Elements of a program that holds several short rows, such as attention heads."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., D], any strides in up to three dimensions if channels adjoin."""
    size = x.shape[-1]
    out = x.new_empty(x.shape)
    if x.stride(-1) != 1 or x.dim() > 3:
        x = x.reshape(-1, size).contiguous()
    heads = x.shape[1] if x.dim() == 3 else 1
    rows = x.numel() // size
    options = _options(size, heads)
    launch(rms_norm_kernel, (cdiv(rows, options["ROWS"]),))(
        x,
        weight,
        out,
        rows,
        x.stride(0) if x.dim() > 1 else size,
        x.stride(1) if x.dim() == 3 else 0,
        eps,
        **options,
        **launch_options(),
    )
    return out


@functools.cache
def _options(size: int, heads: int) -> dict[str, int]:
    block = next_power_of_2(size)
    rows = max(1, _TILE // block)
    return {
        "SIZE": size, "HEADS": heads, "BLOCK": block, "ROWS": rows,
        "num_warps": warps(block * rows, per_thread=16),
    }  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    token_stride,
    head_stride,
    eps,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program normalises ROWS rows; a row is a head of a token."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    start = row // HEADS * token_stride + row % HEADS * head_stride
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0)
    depend(EARLY)
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    # The product of two rounded values is exact in float32, so this rounds like the reference.
    y = with_gain(x * scale[:, None], weight[None, :], out_ptr.dtype.element_ty)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * SIZE + column[None, :], y, mask=inside)

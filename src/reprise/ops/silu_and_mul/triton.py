import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options, silu

_BLOCK = 1024


def silu_and_mul(x: Tensor) -> Tensor:
    """x: [..., 2*I]; in two dimensions its rows may be strided."""
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, 2 * size).contiguous()
    launch(silu_and_mul_kernel, (rows.shape[0], cdiv(size, _BLOCK)))(
        rows, out, rows.stride(0), SIZE=size, BLOCK=_BLOCK, num_warps=4, **launch_options()
    )
    return out


@triton.jit
def silu_and_mul_kernel(
    x_ptr, out_ptr, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """One program computes BLOCK channels of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    start = x_ptr + row * row_stride + column
    depend(EARLY)
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + SIZE, mask=inside, other=0.0).to(tl.float32)
    y = (silu(gate, out_ptr.dtype.element_ty) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * SIZE + column, y, mask=inside)

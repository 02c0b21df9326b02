import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options

_BLOCK = 1024


def swiglu_clamp(x: Tensor, limit: float) -> Tensor:
    """x: [..., 2*I]; in two dimensions its rows may be strided."""
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, 2 * size).contiguous()
    launch(swiglu_clamp_kernel, (rows.shape[0], cdiv(size, _BLOCK)))(
        rows, out, rows.stride(0), limit, SIZE=size, BLOCK=_BLOCK, num_warps=4, **launch_options()
    )
    return out


@triton.jit
def swiglu_clamp_kernel(
    x_ptr, out_ptr, row_stride, limit, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """One program computes BLOCK channels of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    start = x_ptr + row * row_stride + column
    depend(EARLY)
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + SIZE, mask=inside, other=0.0).to(tl.float32)
    # What is no number stays none.
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + column, y.to(out_ptr.dtype.element_ty), mask=inside)

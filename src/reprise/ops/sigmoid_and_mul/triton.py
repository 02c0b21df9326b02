import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options

_BLOCK = 1024


def sigmoid_and_mul(x: Tensor, gate: Tensor) -> Tensor:
    """Shapes as in the reference."""
    rows, size = x.shape
    out = x.new_empty((rows, size))
    x = x if x.stride(1) == 1 else x.contiguous()
    each = gate.shape[1] > 1
    gate = gate if gate.stride(1) == 1 or not each else gate.contiguous()
    launch(sigmoid_and_mul_kernel, (rows, cdiv(size, _BLOCK)))(
        x, gate, out, x.stride(0), gate.stride(0),
        SIZE=size, EACH=each, BLOCK=_BLOCK, num_warps=4, **launch_options(),
    )  # fmt: skip
    return out


@triton.jit
def sigmoid_and_mul_kernel(
    x_ptr,
    gate_ptr,
    out_ptr,
    x_stride,
    gate_stride,
    SIZE: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK channels of a row, each with a gate of its own if EACH."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    depend(EARLY)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if EACH:
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
    else:
        gate = tl.load(gate_ptr + row * gate_stride)
    share = (1 / (1 + tl.exp(-gate.to(tl.float32)))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (x * share).to(dtype), mask=inside)

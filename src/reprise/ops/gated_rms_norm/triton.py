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
)

_TILE = 1024
"""Elements of a program, which takes several short rows."""


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, H, D], contiguous; gate: [T, H * D], its rows may be strided."""
    tokens, heads, size = x.shape
    out = x.new_empty((tokens, heads * size))
    x = x.contiguous()
    if gate.stride(-1) != 1:
        gate = gate.contiguous()
    block = next_power_of_2(size)
    rows_per_program = max(1, _TILE // block)
    rows = tokens * heads
    launch(gated_rms_norm_kernel, (cdiv(rows, rows_per_program),))(
        x,
        gate,
        weight,
        out,
        rows,
        gate.stride(0),
        eps,
        HEADS=heads,
        SIZE=size,
        BLOCK=block,
        ROWS=rows_per_program,
        num_warps=warps(block * rows_per_program, per_thread=8),
        **launch_options(),
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    rows,
    gate_stride,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes ROWS heads of tokens."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < SIZE)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    depend(EARLY)
    x = tl.load(x_ptr + row * SIZE + column, mask=inside, other=0.0)
    gates = gate_ptr + row // HEADS * gate_stride + row % HEADS * SIZE + column
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)[:, None]
    # Rounded where the reference rounds.
    normalised = (wide * scale).to(x.dtype).to(tl.float32) * weight
    y = normalised * (gate / (1 + tl.exp(-gate)))
    tl.store(out_ptr + row * SIZE + column, y.to(x.dtype), mask=inside)

import functools

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.rotary_tail.turn import turn
from reprise.ops.triton_util import (
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
)

_TILE = 4096
"""Elements of a program: it takes several heads of one token, which share its angles."""


def rotary_tail(
    x: Tensor, positions: Tensor, cos_sin: Tensor, norm_eps: float, inverse: bool
) -> Tensor:
    """Shapes as in the reference; tokens and heads may be strided."""
    tokens, heads, size = x.shape
    out = x.new_empty(x.shape)
    if x.stride(2) != 1:
        x = x.contiguous()
    options = _options(heads, size, cos_sin.shape[1] // 2)
    launch(rotary_tail_kernel, (tokens, cdiv(heads, options["HEADS_HERE"])))(
        x,
        positions,
        cos_sin,
        out,
        x.stride(0),
        x.stride(1),
        cos_sin.stride(0),
        norm_eps,
        NORMS=norm_eps != 0,
        BACK=inverse,
        **options,
        **launch_options(),
    )
    return out


@functools.cache
def _options(heads: int, size: int, half: int) -> dict[str, int]:
    block = next_power_of_2(size)
    here = min(next_power_of_2(heads), max(1, _TILE // block))
    return {
        "HEADS": heads, "SIZE": size, "HALF": half, "BLOCK": block, "HEADS_HERE": here,
        "num_warps": warps(block * here, per_thread=32),
    }  # fmt: skip


@triton.jit
def rotary_tail_kernel(
    x_ptr,
    positions_ptr,
    cos_sin_ptr,
    out_ptr,
    token_stride,
    head_stride,
    angle_stride,
    norm_eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_HERE: tl.constexpr,
    NORMS: tl.constexpr,
    BACK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes HEADS_HERE heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_HERE + tl.arange(0, HEADS_HERE))[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (channel < SIZE)
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * angle_stride
    depend(EARLY)
    source = x_ptr + token * token_stride + head * head_stride + channel
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + norm_eps)[:, None]
    y = turn(x, angles, SIZE, HALF, BLOCK, BACK)
    target = out_ptr + (token * HEADS + head) * SIZE + channel
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=inside)

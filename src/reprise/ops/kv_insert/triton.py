import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.rotary_tail.turn import turn
from reprise.ops.store_latent import row_options, row_strides, store_row
from reprise.ops.triton_util import (
    depend,
    launch,
    launch_options,
    next_power_of_2,
    warps,
    with_gain,
)


def kv_insert(
    kv: Tensor,
    gain: Tensor,
    norm_eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: Tensor,
    tail: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Shapes as in the reference; rows and blocks of the cache may be strided."""
    tokens, size = kv.shape
    if kv.stride(1) != 1:
        kv = kv.contiguous()
    block = next_power_of_2(size)
    launch(kv_insert_kernel, (tokens,))(
        kv,
        gain,
        positions,
        cos_sin,
        slots,
        cache,
        tail,
        scales,
        kv.stride(0),
        cos_sin.stride(0),
        *row_strides(cache, tail, scales),
        norm_eps,
        SIZE=size,
        HALF=cos_sin.shape[1] // 2,
        BLOCK_SIZE=cache.shape[1],
        BLOCK=block,
        **row_options(cache, tail, scales),
        num_warps=warps(block, per_thread=4),
        **launch_options(),
    )


@triton.jit
def kv_insert_kernel(
    kv_ptr,
    gain_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    cache_ptr,
    tail_ptr,
    scales_ptr,
    row_stride,
    angle_stride,
    block_stride,
    slot_stride,
    group_stride,
    channel_stride,
    tail_block_stride,
    tail_slot_stride,
    tail_channel_stride,
    scale_block_stride,
    scale_group_stride,
    scale_slot_stride,
    norm_eps,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    TAIL: tl.constexpr,
    ROUND: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes a token."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)[None, :]
    inside = channel < SIZE
    gain = tl.load(gain_ptr + channel, mask=inside, other=0.0)
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * angle_stride
    slot = tl.load(slots_ptr + token)
    depend(EARLY)
    x = tl.load(kv_ptr + token * row_stride + channel, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + norm_eps)[:, None]
    x = with_gain(x, gain, kv_ptr.dtype.element_ty).to(kv_ptr.dtype.element_ty)
    y = turn(x.to(tl.float32), angles, SIZE, HALF, BLOCK, False)
    store_row(
        y.to(kv_ptr.dtype.element_ty).to(tl.float32), slot // BLOCK_SIZE, slot % BLOCK_SIZE,
        cache_ptr, tail_ptr, scales_ptr, block_stride, slot_stride, group_stride, channel_stride,
        tail_block_stride, tail_slot_stride, tail_channel_stride,
        scale_block_stride, scale_group_stride, scale_slot_stride, SIZE, EACH, TAIL, ROUND,
    )  # fmt: skip

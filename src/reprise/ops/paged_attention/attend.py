# mypy: allow-untyped-defs, no-check-untyped-defs
"""What both kernels of paged attention share: the call, its launch, the walk over a range of keys.

Both pack the query heads that share a KV head into the rows of one matrix product, and read
keys, values, lengths and tables through the block table when they run; the host reads no tensor.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.paged_attention.attend_codes import attend_codes
from reprise.ops.paged_attention.scores import blocks, capped, masked
from reprise.ops.triton_util import (
    INTERPRETED,
    dot,
    launch_options,
    next_power_of_2,
    takes_ptx,
)

_LEAST_D = 16
"""Channels of a matrix product at least."""


class Config(NamedTuple):
    """Sizes of one launch."""

    block_m: int
    """Rows of a query tile: query heads of one KV head times tokens."""
    block_n: int
    """Keys of one step of the inner loop."""
    num_warps: int
    num_stages: int
    share: int = 1
    """Split kernel: programs that a multiprocessor runs at a time."""
    one_tile: int = 0
    """Split kernel: keys of a program where it has one tile of them; 0: that is no case of its own.
    """


class Call(NamedTuple):
    """The op's arguments, as in the reference, and what both kernels take of them."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    out: Tensor
    scale: float
    sliding_window: int
    soft_cap: float
    query_len: int
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    prompt: int = 0

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.key_cache.shape[2]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """A kernel's arguments from ``query_ptr`` to ``value_scales_ptr``."""
        return *self[:7], self.key_scales, self.value_scales

    def strides_and_numbers(self) -> tuple[float, ...]:
        """A kernel's arguments from ``query_stride`` to ``window``."""
        return (
            self.query.stride(0),
            self.query.stride(1),
            *_strides("caches", self.key_cache, self.value_cache),
            *_strides("scales", self.key_scales, self.value_scales),
            self.block_tables.stride(0),
            self.out.stride(0),
            self.out.stride(1),
            self.scale,
            self.soft_cap,
            self.sliding_window,
        )

    def options(self, config: Config) -> dict[str, Any]:
        """Constants that both kernels have, and how to launch them."""
        sizes = self.key_cache.shape[1:]
        return {
            **_constants(*sizes, self.sliding_window > 0, self.soft_cap > 0, config),
            "PTX": self.key_scales is not None and takes_ptx(),
            **launch_options(),
        }


@functools.cache
def _constants(
    block_size: int, kv_heads: int, head_size: int, windowed: bool, capped: bool, config: Config
) -> Mapping[str, Any]:
    return {
        "KV_HEADS": kv_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "WIDEN": INTERPRETED,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(_LEAST_D, next_power_of_2(head_size)),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _strides(kind: str, keys: Tensor | None, values: Tensor | None) -> tuple[int, ...]:
    """Strides of a block, a slot and a head of caches; of a block and a head of scales."""
    if keys is None or values is None:
        return 0, 0
    if keys.stride() != values.stride() or keys.stride(-1) != 1:
        what = "channels" if kind == "caches" else "slots"
        raise ValueError(
            f"{kind} of keys and values must have equal strides and adjoining {what}, got "
            f"{keys.stride()} and {values.stride()}"
        )
    return keys.stride()[:-1]


@triton.jit
def attend(
    acc,
    row_sum,
    row_max,
    query,
    key_ptr,
    value_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    block,
    begin,
    end,
    lowest,
    position,
    block_stride,
    slot_stride,
    scale_block_stride,
    scale,
    soft_cap,
    window,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take keys ``begin`` (a multiple of BLOCK_N) to ``end`` into a running softmax.

    acc: [BLOCK_M, BLOCK_D]; row_sum, row_max (base 2): [BLOCK_M]; block: :func:`blocks` of
    ``begin``; position: [BLOCK_M], that of each row's token. Keys below ``lowest`` or not below
    ``end`` may hold anything. Unless MASKED, every row sees all keys. With ``key_scales_ptr`` keys
    and values are eight-bit codes.
    """
    if key_scales_ptr is not None:
        acc, row_sum, row_max = attend_codes(
            acc, row_sum, row_max, query, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
            table_ptr, block, begin, end, lowest, position,
            block_stride, slot_stride, scale_block_stride,
            scale, soft_cap, window,
            HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, MASKED, WIDEN, PTX, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        acc, row_sum, row_max = _attend_numbers(
            acc, row_sum, row_max, query, key_ptr, value_ptr,
            table_ptr, block, begin, end, lowest, position,
            block_stride, slot_stride, scale, soft_cap, window,
            HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, MASKED, WIDEN, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit
def _attend_numbers(
    acc,
    row_sum,
    row_max,
    query,
    key_ptr,
    value_ptr,
    table_ptr,
    block,
    begin,
    end,
    lowest,
    position,
    block_stride,
    slot_stride,
    scale,
    soft_cap,
    window,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """:func:`attend` of keys and values in the compute dtype."""
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]
    for start in range(begin, end, BLOCK_N):
        key_position = start + tl.arange(0, BLOCK_N)
        there = (key_position >= lowest) & (key_position < end)
        # One step ahead, so that the addresses of keys and values wait for no load.
        next_block = blocks(table_ptr, start + BLOCK_N, lowest, end, BLOCK_SIZE, BLOCK_N)
        # A cache may have more than 2**31 elements.
        slot = block.to(tl.int64) * block_stride + (key_position % BLOCK_SIZE) * slot_stride
        offset = slot[:, None] + channel[None, :]
        # Keys that are not there are read from the null block and masked as scores; values that
        # are not there must be zeros, because zero times the NaN of a stale slot is NaN.
        if HEAD_SIZE == BLOCK_D:
            key = tl.load(key_ptr + offset)
        else:
            key = tl.load(key_ptr + offset, mask=real_channel, other=0.0)
        if MASKED:
            value = tl.load(value_ptr + offset, mask=there[:, None] & real_channel, other=0.0)
        elif HEAD_SIZE == BLOCK_D:
            value = tl.load(value_ptr + offset)
        else:
            value = tl.load(value_ptr + offset, mask=real_channel, other=0.0)

        scores = tl.zeros([acc.shape[0], BLOCK_N], dtype=tl.float32)
        scores = dot(query, tl.trans(key), scores, WIDEN)
        factor = scale * 1.4426950408889634
        if CAPPED:
            scores = capped(scores, scale, soft_cap)
            factor = 1.4426950408889634
        if MASKED:
            scores = masked(scores, key_position, there, position, window, WINDOWED)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * factor)
        if MASKED:
            # A row that has seen no key yet has the maximum -inf, and -inf + inf is NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        else:
            shift = new_max
        weights = tl.exp2(tl.fma(scores, factor, -shift[:, None]))
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = dot(weights.to(value.dtype), value, acc, WIDEN)
        row_max = new_max
        block = next_block
    return acc, row_sum, row_max

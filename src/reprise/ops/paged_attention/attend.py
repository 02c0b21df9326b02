# mypy: allow-untyped-defs, no-check-untyped-defs
"""What both kernels of paged attention share: the call, its launch, the walk over a range of keys.

Both pack the query heads that share a KV head into the rows of one matrix product, and read
keys, values, lengths and tables through the block table when they run; the host reads no tensor.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import INTERPRETED, dot, launch_options, next_power_of_2

_LEAST_D = 16
"""Channels of a matrix product at least."""


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    block_m: int
    """Rows of a query tile: query heads of one KV head times tokens."""
    block_n: int
    """Keys of one step of the inner loop."""
    num_warps: int
    num_stages: int
    share: int = 1
    """Split kernel: programs that a multiprocessor runs at a time."""


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

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.key_cache.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """A kernel's arguments from ``query_ptr`` to ``out_ptr``: the fields' first seven."""
        return self[:7]

    def strides_and_numbers(self) -> tuple[float, ...]:
        """A kernel's arguments from ``query_stride`` to ``window``."""
        return (
            self.query.stride(0),
            self.query.stride(1),
            *_cache_strides(self.key_cache, self.value_cache),
            self.block_tables.stride(0),
            self.out.stride(0),
            self.out.stride(1),
            self.scale,
            self.soft_cap,
            self.sliding_window,
        )

    def options(self, config: Config) -> dict[str, Any]:
        """Constants that both kernels have, and how to launch them."""
        _, block_size, kv_heads, head_size = self.key_cache.shape
        return {
            "KV_HEADS": kv_heads,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": block_size,
            "WINDOWED": self.sliding_window > 0,
            "CAPPED": self.soft_cap > 0,
            "WIDEN": INTERPRETED,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": max(_LEAST_D, next_power_of_2(head_size)),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **launch_options(),
        }


def _cache_strides(key_cache: Tensor, value_cache: Tensor) -> tuple[int, int, int]:
    """Strides of a block, a slot and a head."""
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError(
            "key_cache and value_cache must have equal strides and adjoining channels, got "
            f"{key_cache.stride()} and {value_cache.stride()}"
        )
    block, slot, head, _ = key_cache.stride()
    return block, slot, head


@triton.jit
def attend(
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
    """Take keys ``begin`` (a multiple of BLOCK_N) to ``end`` into a running softmax.

    acc: [BLOCK_M, BLOCK_D]; row_sum, row_max (base 2): [BLOCK_M]; block: :func:`blocks` of
    ``begin``; position: [BLOCK_M], that of each row's token. Keys below ``lowest`` or not below
    ``end`` may hold anything. Unless MASKED, every row sees all keys.
    """
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
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which has the right limits.
            tanh = 1 - 2 / (tl.exp(scores * (2 * scale / soft_cap)) + 1)
            scores = soft_cap * tanh
            factor = 1.4426950408889634
        if MASKED:
            visible = there[None, :] & (key_position[None, :] <= position[:, None])
            if WINDOWED:
                visible &= key_position[None, :] > (position - window)[:, None]
            scores = tl.where(visible, scores, -float("inf"))
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


@triton.jit
def blocks(table_ptr, start, lowest, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] block of each key from ``start``; the null block for keys that are not there."""
    key_position = start + tl.arange(0, BLOCK_N)
    there = (key_position >= lowest) & (key_position < end)
    return tl.load(table_ptr + key_position // BLOCK_SIZE, mask=there, other=0)

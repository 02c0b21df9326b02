"""Paged attention in Triton: two kernels behind one entry.

``split_attention_kernel`` serves steps in which every request has the same few new tokens (decode,
verification of drafts). A request's keys are shared out to several programs, and the last of these
to end merges what they found, always in the same order. The number of programs follows from shapes
alone, so a device graph can hold the launch; which keys a program takes is worked out on the device
from the lengths of the moment, so that long requests get many programs and short ones few.

``mixed_attention_kernel`` serves all other steps: one program takes a tile of a request's new
tokens.

Both pack the query heads that share a KV head into the rows of one matrix product, and read
keys, values, lengths and tables through the block table when they run; the host reads no tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.registry import op_memory
from reprise.ops.triton_util import (
    INTERPRETED,
    DeviceLimits,
    depend,
    launch_options,
    limits,
    relaunch,
)

_MAX_SPLIT_ROWS = 64
"""Query heads of a KV head times new tokens, up to which the split kernel is used."""
_LOG2E = math.log2(math.e)


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
    """Split kernel: programs for each multiprocessor beside one for each request."""


def split_config(
    rows: int, programs: int, head_size: int, element_size: int, device: DeviceLimits
) -> Config:
    """For the split kernel.

    Args:
        rows: Query heads of a KV head times new tokens.
        programs: The fewest that the step can have: requests times KV heads.
        head_size: Channels of a head.
        element_size: Bytes of one.
        device: Where it runs.
    """
    block_m = max(16, triton.next_power_of_2(rows))
    block_d = triton.next_power_of_2(head_size)
    if INTERPRETED:  # its time goes by the number of steps
        return Config(block_m, 64, 1, 1)
    if element_size == 4:  # products hold their operands in registers
        return Config(block_m, 16, 8 if block_d > 128 else 4, 2)
    # Few programs need much on its way to each; many fill a multiprocessor better if small.
    small = block_m * block_d <= 16 * 128 and programs > device.multiprocessors
    block_n, num_warps = (32, 1) if small else (64, 4)
    if block_d > 128:
        block_n = 32
    # More programs share out long requests among short ones more evenly; one that gets nothing
    # to do costs little. In between they only cut the work smaller.
    share = 3 if small else 2 if 8 * programs <= device.multiprocessors else 1
    # Keys and values on their way to a program are all but those in use. As deep as leaves room
    # for two programs on a multiprocessor.
    tile = 2 * block_n * block_d * element_size
    num_stages = 2
    for deeper in (3, 4):
        if 2 * ((deeper - 1) * tile + 8 * 1024) <= device.shared_memory:
            num_stages = deeper
    return Config(block_m, block_n, num_warps, num_stages, share)


def mixed_config(group: int, head_size: int, element_size: int, device: DeviceLimits) -> Config:
    """For the mixed kernel; ``group`` is query heads of a KV head."""
    smallest = triton.next_power_of_2(group)
    wide = triton.next_power_of_2(head_size) > 128
    if INTERPRETED:
        return Config(max(32, smallest), 64, 1, 1)
    if element_size == 4:
        return Config(max(16, smallest), 16, 8 if wide else 4, 1)
    if device.shared_memory < 128 * 1024:
        return Config(max(64, smallest), 32, 4, 1)
    if device.shared_memory < 224 * 1024:
        return Config(max(128, smallest), 32 if wide else 64, 8, 3)
    return Config(max(128, smallest), 64 if wide else 128, 8, 2 if wide else 3)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    query_len: int,
) -> None:
    """Arguments as in the reference."""
    bind(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        out,
        scale,
        sliding_window,
        soft_cap,
        query_len,
    )


def bind(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    query_len: int,
) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    group = query.shape[1] // key_cache.shape[2]
    few = query_len > 0 and query_len * group <= _MAX_SPLIT_ROWS
    launch = _launch_split if few else _launch_mixed
    return launch(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        out,
        scale,
        sliding_window,
        soft_cap,
        query_len,
    )


paged_attention.bind = bind  # type: ignore[attr-defined]


def _launch_split(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, out, scale,
    sliding_window, soft_cap, query_len, config=None,
):  # fmt: skip
    tokens, heads, head_size = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    requests, max_blocks = block_tables.shape
    device = limits(query.device)
    group = heads // kv_heads
    config = config or split_config(
        group * query_len, requests * kv_heads, head_size, query.element_size(), device
    )
    min_tiles = max(1, 128 // config.block_n)
    pieces = requests
    if max_blocks * block_size > min_tiles * config.block_n:
        # One for each request, and enough for the whole device to share out by length.
        pieces += triton.cdiv(config.share * device.multiprocessors, kv_heads)
    block_r = _few_sizes(requests)
    plan = {
        "QUERY_LEN": query_len,
        "WINDOWED": sliding_window > 0,
        "BLOCK_N": config.block_n,
        "MIN_TILES": min_tiles,
        "BLOCK_R": block_r,
        "GUESSES": 8 if block_r <= 16 else 4,
        "SPLIT": pieces > requests,
        "MERGED": min(8, max(4, 2 * config.num_warps)),
    }
    inputs = (query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, out)
    sizes = (
        tokens,
        requests,
        pieces,
        query.stride(0),
        query.stride(1),
        *_cache_strides(key_cache, value_cache),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        scale,
        soft_cap,
        sliding_window,
    )
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "CAPPED": soft_cap > 0,
        "WIDEN": INTERPRETED,
        "BLOCK_M": config.block_m,
        "BLOCK_D": triton.next_power_of_2(head_size),
        **plan,
    }
    early = launch_options()
    constants["EARLY"] = early.pop("EARLY")
    options = {**early, "num_warps": config.num_warps, "num_stages": config.num_stages}
    # Rows that no request covers are cleared by programs without a piece.
    split_grid = (max(pieces, triton.cdiv(tokens, query_len)) * kv_heads,)
    arrivals = _arrivals(requests * kv_heads, query.device)

    def scratch():
        if pieces == requests:
            return out, out
        partial = query.new_empty((pieces, query_len * heads, head_size), dtype=torch.float32)
        return partial, query.new_empty((pieces, query_len * heads), dtype=torch.float32)

    compiled = split_attention_kernel[split_grid](
        *inputs, arrivals, *scratch(), *sizes, **constants, **options
    )
    split = relaunch(split_attention_kernel, compiled, split_grid)
    return lambda: split(*inputs, arrivals, *scratch(), *sizes, **constants)


def _arrivals(count: int, device: torch.device) -> Tensor:
    """At least ``count`` zeros, in which programs that share a request find out who is the last.
    A launch leaves them as zeros; an engine's launches run one after the other."""
    size = max(8192, triton.next_power_of_2(count))
    memory, key = op_memory(), ("split attention", device, size)
    if key not in memory:
        memory[key] = torch.zeros(size, device=device, dtype=torch.int32)
    return memory[key]


def _launch_mixed(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, out, scale,
    sliding_window, soft_cap, query_len, config=None,
):  # fmt: skip
    tokens, heads, head_size = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    requests = block_tables.shape[0]
    group = heads // kv_heads
    config = config or mixed_config(group, head_size, query.element_size(), limits(query.device))
    block_q = config.block_m // group
    # Request r's tiles start at query_start_loc[r] // block_q + r, which leaves each enough.
    tiles = triton.cdiv(tokens, block_q) + requests
    args = (
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        out,
        tokens,
        requests,
        query.stride(0),
        query.stride(1),
        *_cache_strides(key_cache, value_cache),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        scale,
        soft_cap,
        sliding_window,
    )
    constants = {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "WINDOWED": sliding_window > 0,
        "CAPPED": soft_cap > 0,
        "WIDEN": INTERPRETED,
        "BLOCK_M": config.block_m,
        "BLOCK_Q": block_q,
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(head_size),
    }
    early = launch_options()
    constants["EARLY"] = early.pop("EARLY")
    options = {**early, "num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (tiles * kv_heads,)
    compiled = mixed_attention_kernel[grid](*args, **constants, **options)
    again = relaunch(mixed_attention_kernel, compiled, grid)
    return lambda: again(*args, **constants)


def _cache_strides(key_cache: Tensor, value_cache: Tensor) -> tuple[int, int, int]:
    """Strides of a block, a slot and a head."""
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError(
            "key_cache and value_cache must have equal strides and adjoining channels, got "
            f"{key_cache.stride()} and {value_cache.stride()}"
        )
    block, slot, head, _ = key_cache.stride()
    return block, slot, head


def _few_sizes(count: int) -> int:
    """A power of four from 16: few sizes, so few compilations."""
    size = 16
    while size < count:
        size *= 4
    return size


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """a @ b + acc. The interpreter multiplies float32 correctly and bfloat16 as integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee" concerns float32 alone: no rounding to tf32.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _attend(
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

    acc: [BLOCK_M, BLOCK_D]; row_sum, row_max (base 2): [BLOCK_M]; block: :func:`_blocks` of
    ``begin``; position: [BLOCK_M], that of each row's token. Keys below ``lowest`` or not below
    ``end`` may hold anything. Unless MASKED, every row sees all keys.
    """
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]
    for start in range(begin, end, BLOCK_N):
        key_position = start + tl.arange(0, BLOCK_N)
        there = (key_position >= lowest) & (key_position < end)
        # One step ahead, so that the addresses of keys and values wait for no load.
        next_block = _blocks(table_ptr, start + BLOCK_N, lowest, end, BLOCK_SIZE, BLOCK_N)
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
        scores = _dot(query, tl.trans(key), scores, WIDEN)
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
        acc = _dot(weights.to(value.dtype), value, acc, WIDEN)
        row_max = new_max
        block = next_block
    return acc, row_sum, row_max


@triton.jit
def _blocks(table_ptr, start, lowest, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] block of each key from ``start``; the null block for keys that are not there."""
    key_position = start + tl.arange(0, BLOCK_N)
    there = (key_position >= lowest) & (key_position < end)
    return tl.load(table_ptr + key_position // BLOCK_SIZE, mask=there, other=0)


@triton.jit
def _plan(
    seq_lens_ptr,
    starts_ptr,
    requests,
    most_pieces,
    window,
    WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GUESSES: tl.constexpr,
):
    """How many pieces each request gets; together no more than ``most_pieces``.

    Returns, each [BLOCK_R]: request, pieces, length, begin (its first row), new (its rows).
    """
    request = tl.arange(0, BLOCK_R)
    real = request < requests
    length = tl.load(seq_lens_ptr + request, mask=real, other=0)
    begin = tl.load(starts_ptr + request, mask=real, other=0)
    new = tl.load(starts_ptr + request + 1, mask=real, other=0) - begin
    _, count = _tiles(length, new, window, WINDOWED, BLOCK_N)
    # Pieces of ``low`` tiles could just hold all tiles. Rounding up costs each request less than
    # one piece more, so with ``high`` they do for certain. Of sizes between, the first that does.
    total = tl.sum(count)
    low = tl.cdiv(total, most_pieces)
    high = tl.cdiv(total, tl.maximum(1, most_pieces - requests))
    guess = tl.arange(0, GUESSES)
    size = tl.maximum(MIN_TILES, low + (high - low) * guess // max(1, GUESSES - 1))
    needed = tl.sum(tl.maximum(1, tl.cdiv(count[:, None], size[None, :])), axis=0)
    needed -= BLOCK_R - requests
    fits = (needed <= most_pieces) | (guess == GUESSES - 1)
    chosen = tl.min(tl.where(fits, size, 2147483647))
    pieces = tl.where(real, tl.maximum(1, tl.cdiv(count, chosen)), 0)
    return request, pieces, length, begin, new


@triton.jit
def _pick(values, request, which):
    """The value of one request."""
    return tl.sum(tl.where(request == which, values, 0))


@triton.jit
def _tiles(length, new, window, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """First tile of BLOCK_N keys that a request needs, and how many."""
    if WINDOWED:
        first = tl.maximum(0, length - new - window + 1) // BLOCK_N
    else:
        first = length * 0
    return first, tl.cdiv(length, BLOCK_N) - first


@triton.jit(do_not_specialize=["tokens", "requests", "most_pieces"])
def split_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    arrivals_ptr,
    partial_ptr,
    log_sums_ptr,
    tokens,
    requests,
    most_pieces,
    query_stride,
    query_head_stride,
    block_stride,
    slot_stride,
    head_stride,
    table_stride,
    out_stride,
    out_head_stride,
    scale,
    soft_cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GUESSES: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends to one piece of a request's keys, for one KV head.

    Writes ``out`` if the request has one piece, else ``partial`` [pieces, QUERY_LEN * HEADS,
    HEAD_SIZE] and the base-2 logarithm of the sum of its weights. ``arrivals`` [R, KV_HEADS] counts
    the pieces that are done; the last one merges them all. Unless SPLIT, every request has one.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    piece = tl.program_id(0) // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]

    number, pieces, lengths, begins, news = _plan(
        seq_lens_ptr, starts_ptr, requests, most_pieces, window,
        WINDOWED, BLOCK_N, MIN_TILES, BLOCK_R, GUESSES,
    )  # fmt: skip
    # A program without a piece follows the last request up to where it returns.
    found = tl.sum((tl.cumsum(pieces, axis=0) <= piece).to(tl.int32))
    request = tl.minimum(found, requests - 1)
    mine = _pick(pieces, number, request)
    first_piece = tl.sum(tl.where(number < request, pieces, 0))
    part = piece - first_piece
    length = _pick(lengths, number, request)
    begin = _pick(begins, number, request)
    new = _pick(news, number, request)
    first, count = _tiles(length, new, window, WINDOWED, BLOCK_N)
    first_key = (first + count * part // mine) * BLOCK_N
    end_key = tl.minimum(length, (first + count * (part + 1) // mine) * BLOCK_N)
    lowest = length - new - window + 1 if WINDOWED else 0
    table_ptr += request.to(tl.int64) * table_stride
    block = _blocks(table_ptr, first_key, lowest, end_key, BLOCK_SIZE, BLOCK_N)
    depend(EARLY)

    covered = tl.max(begins + news)
    if (piece + 1) * QUERY_LEN > covered:
        target = piece * QUERY_LEN + token
        behind = (token < QUERY_LEN) & (target >= covered) & (target < tokens)
        offset = target.to(tl.int64) * out_stride + head * out_head_stride
        nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + offset[:, None] + channel[None, :],
            nothing,
            mask=behind[:, None] & real_channel,
        )
    if found >= requests:
        return
    used = token < new
    query_row = (begin + token).to(tl.int64)
    query_offset = query_row * query_stride + head * query_head_stride
    used_channel = used[:, None] & real_channel
    query = tl.load(
        query_ptr + query_offset[:, None] + channel[None, :], mask=used_channel, other=0.0
    )
    position = length - new + token
    acc, row_sum, row_max = _attend(
        tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32),
        tl.zeros([BLOCK_M], dtype=tl.float32),
        tl.full([BLOCK_M], -float("inf"), dtype=tl.float32),
        query,
        key_ptr + kv_head * head_stride,
        value_ptr + kv_head * head_stride,
        table_ptr,
        block,
        first_key,
        end_key,
        lowest,
        position,
        block_stride,
        slot_stride,
        scale,
        soft_cap,
        window,
        HEAD_SIZE,
        BLOCK_SIZE,
        WINDOWED,
        CAPPED,
        True,
        WIDEN,
        BLOCK_N,
        BLOCK_D,
    )
    # Rows that saw no key stay zero.
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    if not SPLIT or mine == 1:
        out_offset = query_row * out_stride + head * out_head_stride
        tl.store(
            out_ptr + out_offset[:, None] + channel[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=used_channel,
        )
    else:
        partial_row = piece.to(tl.int64) * (QUERY_LEN * HEADS) + token * HEADS + head
        tl.store(
            partial_ptr + partial_row[:, None] * HEAD_SIZE + channel[None, :],
            acc.to(partial_ptr.dtype.element_ty),
            mask=used_channel,
        )
        log_sum = row_max + tl.log2(row_sum)
        tl.store(log_sums_ptr + partial_row, log_sum.to(log_sums_ptr.dtype.element_ty), mask=used)
        # All threads have stored before one announces it.
        tl.debug_barrier()
        arrival_ptr = arrivals_ptr + request * KV_HEADS + kv_head
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == mine - 1:
            tl.store(arrival_ptr, 0)
            _merge(
                partial_ptr, log_sums_ptr, out_ptr + begin.to(tl.int64) * out_stride,
                first_piece, mine, new, kv_head, out_stride, out_head_stride,
                QUERY_LEN, HEADS, GROUP, HEAD_SIZE, BLOCK_D, MERGED,
            )  # fmt: skip


@triton.jit
def _merge(
    partial_ptr,
    log_sums_ptr,
    out_ptr,
    first,
    pieces,
    new,
    kv_head,
    out_stride,
    out_head_stride,
    QUERY_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Write a request's output for one KV head from its pieces, MERGED at a time, in their order.

    partial: [pieces, QUERY_LEN * HEADS, HEAD_SIZE]; log_sums: without the last dimension, base 2.
    The programs that wrote them have just ended: the nearest cache may hold older values.
    """
    ROWS: tl.constexpr = 2 if GROUP * QUERY_LEN <= 2 else 4
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]
    for start_row in range(0, new * GROUP, ROWS):
        row = start_row + tl.arange(0, ROWS)
        real_row = row < new * GROUP
        head = kv_head * GROUP + row % GROUP
        acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        largest = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        for start in range(0, pieces, MERGED):
            piece = start + tl.arange(0, MERGED)
            real = real_row[:, None] & (piece < pieces)[None, :]
            source = (first + piece).to(tl.int64)[None, :] * (QUERY_LEN * HEADS)
            source += (row // GROUP * HEADS + head)[:, None]
            log_sum = tl.load(
                log_sums_ptr + source, mask=real, other=-float("inf"), cache_modifier=".cg"
            )
            found = tl.load(
                partial_ptr + source[:, :, None] * HEAD_SIZE + channel[None, None, :],
                mask=real[:, :, None] & real_channel[None, :, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_largest = tl.maximum(largest, tl.max(log_sum, axis=1))
            shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
            weights = tl.exp2(log_sum - shift[:, None])
            decay = tl.exp2(largest - shift)
            acc = acc * decay[:, None] + tl.sum(found * weights[:, :, None], axis=1)
            total = total * decay + tl.sum(weights, axis=1)
            largest = new_largest
        target = (row // GROUP).to(tl.int64) * out_stride + head * out_head_stride
        tl.store(
            out_ptr + target[:, None] + channel[None, :],
            (acc / tl.where(total == 0, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty),
            mask=real_row[:, None] & real_channel,
        )


@triton.jit(do_not_specialize=["tokens", "requests"])
def mixed_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    tokens,
    requests,
    query_stride,
    query_head_stride,
    block_stride,
    slot_stride,
    head_stride,
    table_stride,
    out_stride,
    out_head_stride,
    scale,
    soft_cap,
    window,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends for BLOCK_Q new tokens of a request, for one KV head."""
    kv_head = tl.program_id(0) % KV_HEADS
    # The last tiles see the most keys; starting with them leaves no long one for the end.
    tile = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_D)
    real_channel = (channel < HEAD_SIZE)[None, :]

    covered = tl.load(starts_ptr + requests)
    depend(EARLY)
    if tile >= covered // BLOCK_Q + requests:
        target = (tile - requests) * BLOCK_Q + token
        behind = (token < BLOCK_Q) & (target >= covered) & (target < tokens)
        offset = target.to(tl.int64) * out_stride + head * out_head_stride
        nothing = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + offset[:, None] + channel[None, :],
            nothing,
            mask=behind[:, None] & real_channel,
        )
        return

    # Binary search for the last request whose first tile is not behind this one.
    request = 0
    too_far = requests
    while request + 1 < too_far:
        middle = (request + too_far) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= tile:
            request = middle
        else:
            too_far = middle
    begin = tl.load(starts_ptr + request)
    new = tl.load(starts_ptr + request + 1) - begin
    token += (tile - begin // BLOCK_Q - request) * BLOCK_Q
    first_token = (tile - begin // BLOCK_Q - request) * BLOCK_Q
    if first_token >= new:
        return
    length = tl.load(seq_lens_ptr + request)

    used = (row < BLOCK_Q * GROUP) & (token < new)
    used_channel = used[:, None] & real_channel
    query_row = (begin + token).to(tl.int64)
    query_offset = query_row * query_stride + head * query_head_stride
    query = tl.load(
        query_ptr + query_offset[:, None] + channel[None, :], mask=used_channel, other=0.0
    )
    first_position = length - new + first_token
    position = length - new + token
    end_key = tl.minimum(length, first_position + BLOCK_Q)
    # Keys that every row sees need no mask: up to the first token's position, and from where the
    # last token's window starts.
    clear_end = (first_position + 1) // BLOCK_N * BLOCK_N
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    table_ptr += request.to(tl.int64) * table_stride  # type: ignore[attr-defined]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    lowest = 0
    clear_begin = 0
    if WINDOWED:
        lowest = tl.maximum(0, first_position - window + 1)
        left = lowest // BLOCK_N * BLOCK_N
        clear_begin = tl.maximum(0, first_position + BLOCK_Q - window)
        clear_begin = tl.cdiv(clear_begin, BLOCK_N) * BLOCK_N
        block = _blocks(table_ptr, left, lowest, end_key, BLOCK_SIZE, BLOCK_N)
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, query, key_ptr, value_ptr, table_ptr, block,
            left, tl.minimum(clear_begin, end_key), lowest, position,
            block_stride, slot_stride, scale, soft_cap, window,
            HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    block = _blocks(table_ptr, clear_begin, lowest, clear_end, BLOCK_SIZE, BLOCK_N)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, query, key_ptr, value_ptr, table_ptr, block,
        clear_begin, clear_end, lowest, position,
        block_stride, slot_stride, scale, soft_cap, window,
        HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, False, WIDEN, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    diagonal = tl.maximum(clear_begin, clear_end)
    block = _blocks(table_ptr, diagonal, lowest, end_key, BLOCK_SIZE, BLOCK_N)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, query, key_ptr, value_ptr, table_ptr, block,
        diagonal, end_key, lowest, position,
        block_stride, slot_stride, scale, soft_cap, window,
        HEAD_SIZE, BLOCK_SIZE, WINDOWED, CAPPED, True, WIDEN, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    out_offset = query_row * out_stride + head * out_head_stride
    tl.store(
        out_ptr + out_offset[:, None] + channel[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=used_channel,
    )

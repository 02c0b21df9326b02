"""Paged attention of steps in which every request has the same few new tokens: decode,
verification of drafts.

A request's keys are shared out to several programs, and the last of these to end merges what they
found, always in the same order. The number of programs follows from shapes alone, so a device graph
can hold the launch; which keys a program takes is worked out on the device from the lengths of the
moment, so that long requests get many programs and short ones few.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.paged_attention.attend import Call, Config, attend, blocks
from reprise.ops.registry import op_memory
from reprise.ops.triton_util import INTERPRETED, DeviceLimits, depend, limits, relaunch


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


def launch_split(call: Call, config: Config | None = None) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    query, out, query_len = call.query, call.out, call.query_len
    tokens, heads, head_size = query.shape
    _, block_size, kv_heads, _ = call.key_cache.shape
    requests, max_blocks = call.block_tables.shape
    device = limits(query.device)
    config = config or split_config(
        call.group * query_len, requests * kv_heads, head_size, query.element_size(), device
    )
    min_tiles = max(1, 128 // config.block_n)
    pieces = requests
    if max_blocks * block_size > min_tiles * config.block_n:
        # One for each request, and enough for the whole device to share out by length.
        pieces += triton.cdiv(config.share * device.multiprocessors, kv_heads)
    block_r = _few_sizes(requests)
    options = {
        **call.options(config),
        "HEADS": heads,
        "QUERY_LEN": query_len,
        "MIN_TILES": min_tiles,
        "BLOCK_R": block_r,
        "GUESSES": 8 if block_r <= 16 else 4,
        "SPLIT": pieces > requests,
        "MERGED": min(8, max(4, 2 * config.num_warps)),
    }
    inputs = (*call.tensors(), _arrivals(requests * kv_heads, query.device))
    sizes = (tokens, requests, pieces, *call.strides_and_numbers())
    # Rows that no request covers are cleared by programs without a piece.
    grid = (max(pieces, triton.cdiv(tokens, query_len)) * kv_heads,)

    def scratch() -> tuple[Tensor, Tensor]:
        if pieces == requests:
            return out, out
        partial = query.new_empty((pieces, query_len * heads, head_size), dtype=torch.float32)
        return partial, query.new_empty((pieces, query_len * heads), dtype=torch.float32)

    compiled = split_attention_kernel[grid](*inputs, *scratch(), *sizes, **options)
    again = relaunch(split_attention_kernel, compiled, grid)
    return lambda: again(*inputs, *scratch(), *sizes, **options)


def _arrivals(count: int, device: torch.device) -> Tensor:
    """At least ``count`` zeros, in which programs that share a request find out who is the last.
    A launch leaves them as zeros; an engine's launches run one after the other."""
    size = max(8192, triton.next_power_of_2(count))
    memory, key = op_memory(), ("split attention", device, size)
    if key not in memory:
        memory[key] = torch.zeros(size, device=device, dtype=torch.int32)
    return memory[key]


def _few_sizes(count: int) -> int:
    """A power of four from 16: few sizes, so few compilations."""
    size = 16
    while size < count:
        size *= 4
    return size


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
    block = blocks(table_ptr, first_key, lowest, end_key, BLOCK_SIZE, BLOCK_N)
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
    acc, row_sum, row_max = attend(
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

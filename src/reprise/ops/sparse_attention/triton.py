# mypy: allow-untyped-defs, no-check-untyped-defs
"""Attention over a window and over compressed rows in Triton.

All heads share their rows, so the heads of one token are the rows of a matrix product. What a token
sees is one list: the rows of its window, then compressed ones; it is cut into as many equal parts
as there are programs for a token, by lengths that are read on the device. Where there are several,
a second kernel merges what they found, in their order. Prompts have a program or more for each
token too: the rows that neighbours share come from the last-level cache. Where tokens are few two
programs share a part: each finds all scores and sums half of the channels of the values, so that
less has to be merged, and half as many sums are in its registers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.load_codes import in_pairs, plain
from reprise.ops.request_of import block_of, request_of
from reprise.ops.store_latent import row_strides
from reprise.ops.triton_util import (
    INTERPRETED,
    DeviceLimits,
    cdiv,
    depend,
    dot,
    launch,
    launch_options,
    limits,
    next_power_of_2,
)

_LOG2_E = 1.4426950408889634
_CHUNK = 32 if INTERPRETED else 512
"""Compressed rows whose places are read at once."""


@dataclass(frozen=True)
class Config:
    """Sizes of a launch."""

    block_m: int
    """Heads of a program."""
    block_n: int
    """Rows at a time."""
    num_warps: int
    num_stages: int
    least: int
    """Rows that a part has at least, unless there are fewer."""
    slices: int = 1
    """Programs that share out the channels of the same rows."""


@functools.cache
def attention_config(
    tokens: int, heads: int, size: int, element_size: int, codes: bool, device: DeviceLimits
) -> Config:
    """``size``: channels of a head; ``codes``: rows become numbers in registers."""
    if INTERPRETED:
        slices = 2 if tokens <= 4 else 1
        return Config(max(16, next_power_of_2(heads)), 16, 1, 1, 16, slices)
    block_d = next_power_of_2(size)
    if element_size == 4:  # products hold their operands in registers
        return Config(16, 16, 8, 1, 64)
    wide = next_power_of_2(min(heads, 64))
    row = block_d * element_size
    # Rows in use and rows on their way, the queries, the weights.
    if wide == 64 and (64 + 2 * 64) * row + 16 * 1024 <= device.shared_memory:
        slices = 2 if 2 * tokens * cdiv(heads, 64) <= device.multiprocessors else 1
        if slices == 2 and tokens >= 32 and not codes:
            return Config(64, 32, 4, 4, 128, slices)
        block_n, stages = (64, 2) if tokens >= 32 and not codes else (32, 3)
        return Config(64, block_n, 8, stages, 128 if tokens >= 32 else 32, slices)
    for block_n, stages in ((32, 3), (32, 2), (16, 3), (16, 2)):
        if (16 + stages * block_n) * row + 8 * 1024 <= device.shared_memory:
            return Config(16, block_n, 4, stages, 2 * block_n)
    return Config(16, 16, 4, 1, 32)


def splits(tokens: int, groups: int, most_rows: int, config: Config, device: DeviceLimits) -> int:
    """Parts that the rows of a token are cut into, at most; it follows from shapes alone."""
    programs = device.multiprocessors * (1 if config.block_m == 64 else 2)
    here = max(1, tokens * groups * config.slices)
    return max(1, min(programs // here, cdiv(most_rows, config.least)))


def sparse_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    compressed: Tensor | None,
    compressed_tables: Tensor | None,
    selected: Tensor | None,
    sinks: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    every: int,
    query_len: int,
    cache_tail: Tensor | None = None,
    scales: Tensor | None = None,
    compressed_tail: Tensor | None = None,
    compressed_scales: Tensor | None = None,
) -> None:
    """Shapes as in the reference."""
    bind(
        query, cache, block_tables, compressed, compressed_tables, selected, sinks, seq_lens,
        query_start_loc, out, scale, sliding_window, every, query_len,
        cache_tail, scales, compressed_tail, compressed_scales,
    )  # fmt: skip


def bind(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    compressed: Tensor | None,
    compressed_tables: Tensor | None,
    selected: Tensor | None,
    sinks: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    every: int,
    query_len: int,
    cache_tail: Tensor | None = None,
    scales: Tensor | None = None,
    compressed_tail: Tensor | None = None,
    compressed_scales: Tensor | None = None,
) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    tokens, heads, size = query.shape
    requests = len(seq_lens)
    device = limits(query.device)
    config = attention_config(tokens, heads, size, query.element_size(), scales is not None, device)
    groups = cdiv(heads, config.block_m)
    most, kind = sliding_window, 0
    if compressed is not None and selected is not None:
        most, kind = most + selected.shape[1], 1
    elif compressed is not None and compressed_tables is not None:
        most, kind = most + compressed_tables.shape[1] * compressed.shape[1], 2
    rows, rows_tail, rows_scales = cache, cache_tail, scales
    if compressed is not None:
        rows, rows_tail, rows_scales = compressed, compressed_tail, compressed_scales
    tables = block_tables if compressed_tables is None else compressed_tables
    chosen = tables if selected is None else selected
    parts = splits(tokens, groups, most, config, device)
    block_d = next_power_of_2(size)
    tail = 0 if cache_tail is None else cache_tail.shape[2]
    inputs = (
        query,
        cache,
        cache_tail,
        scales,
        block_tables,
        rows,
        rows_tail,
        rows_scales,
        tables,
        chosen,
        sinks,
        seq_lens,
        query_start_loc,
        out,
    )
    numbers = (
        requests, *query.stride()[:2], *row_strides(cache, cache_tail, scales),
        block_tables.stride(0), *row_strides(rows, rows_tail, rows_scales), tables.stride(0),
        chosen.stride(0), *out.stride()[:2], scale * _LOG2_E,
    )  # fmt: skip
    options = {
        "HEADS": heads, "SIZE": size, "WINDOW": sliding_window, "EVERY": every, "KIND": kind,
        "TOP": chosen.shape[1] if kind == 1 else 1, "BLOCK_SIZE": cache.shape[1],
        "ROWS_BLOCK": rows.shape[1], "PARTS": parts, "LEAST": config.least,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d,
        "BLOCK_R": block_of(requests), "CHUNK": max(config.block_n, _CHUNK),
        "BLOCK_W": next_power_of_2(sliding_window // cache.shape[1] + 2),
        "BLOCK_TOP": next_power_of_2(chosen.shape[1]) if kind == 1 else 1,
        "SLICES": config.slices, "EACH": 0 if scales is None else cache.shape[-1],
        "TAIL": tail, "BLOCK_T": max(16, next_power_of_2(tail)),
        "PAIRS": in_pairs(query, cache), "WIDEN": INTERPRETED, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **launch_options(),
    }  # fmt: skip
    if tokens == 0:
        return lambda: None

    def scratch() -> tuple[Tensor, Tensor]:
        shape = (parts, tokens, heads) if parts > 1 else (0, 0, 0)
        found = query.new_empty((*shape, size), dtype=torch.float32)
        return found, query.new_empty((*shape, config.slices), dtype=torch.float32)

    found, sums = scratch()
    again = launch(sparse_attention_kernel, (tokens, groups * config.slices, parts))(
        *inputs, found, sums, tokens, *numbers, **options
    )
    if parts == 1:
        return lambda: again(*inputs, *scratch(), tokens, *numbers)
    block = min(128, block_d // config.slices)
    merged = {
        "HEADS": heads, "SIZE": size, "PARTS": parts, "SLICES": config.slices,
        "SLICE": block_d // config.slices, "BLOCK": block, "STEP": min(32, next_power_of_2(parts)),
        "num_warps": 4, **launch_options(),
    }  # fmt: skip
    merge = launch(sparse_merge_kernel, (tokens, heads, cdiv(size, block)))(
        found, sums, sinks, out, tokens, *out.stride()[:2], **merged
    )

    def repeat() -> None:
        found, sums = scratch()
        again(*inputs, found, sums, tokens, *numbers)
        merge(found, sums, sinks, out, tokens, *out.stride()[:2])

    return repeat


sparse_attention.bind = bind  # type: ignore[attr-defined]


@triton.jit
def _load_rows(
    numbers, factors, seen, first, group_stride, channel_stride, factor_stride,
    CHANNELS: tl.constexpr, PLAIN: tl.constexpr, EACH: tl.constexpr, kind: tl.constexpr,
    PAIRS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels from ``first`` on, of rows whose PLAIN ones lie at ``numbers`` [BLOCK_N];
    as ``kind``. EACH: channels of a scale, which lie at ``factors``; 0: there are none."""
    channel = first + tl.arange(0, CHANNELS)
    real = seen[:, None] & (channel < PLAIN)[None, :]
    if EACH == 0:
        place = channel * channel_stride
        rows = tl.load(numbers[:, None] + place[None, :], mask=real, other=0.0)
    else:
        GROUPS: tl.constexpr = CHANNELS // EACH
        place = channel // EACH * group_stride + channel % EACH * channel_stride
        codes = tl.load(numbers[:, None] + place[None, :], mask=real, other=0.0)
        group = first // EACH + tl.arange(0, GROUPS)
        scale = tl.load(
            factors[:, None] + group[None, :] * factor_stride,
            mask=seen[:, None] & (group < PLAIN // EACH)[None, :],
            other=0.0,
        )
        # A code times a power of two is rounded once, if at all, in any type.
        between: tl.constexpr = tl.float32 if WIDEN else kind
        wide = tl.reshape(plain(codes, between, PAIRS), [codes.shape[0], GROUPS, EACH])
        wide = wide * scale.to(between)[:, :, None]
        rows = tl.reshape(wide, [codes.shape[0], CHANNELS]).to(kind)
    return rows


@triton.jit
def _attend(
    acc, tail_acc, row_sum, row_max, query, other_query, tail_query,
    numbers, tails, factors, seen, scale, first, other,
    group_stride, channel_stride, tail_stride, factor_stride,
    CHANNELS: tl.constexpr, SLICES: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_T: tl.constexpr, PAIRS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, over rows that lie at ``numbers`` [BLOCK_N], their last TAIL
    channels at ``tails``. Values are summed of the CHANNELS channels from ``first`` on, and of
    those last ones; those from ``other`` on, if there are two slices, count in scores alone."""
    kind: tl.constexpr = query.dtype
    PLAIN: tl.constexpr = SIZE - TAIL
    rows = _load_rows(
        numbers, factors, seen, first, group_stride, channel_stride, factor_stride,
        CHANNELS, PLAIN, EACH, kind, PAIRS, WIDEN,
    )  # fmt: skip
    zero = tl.zeros([query.shape[0], rows.shape[0]], dtype=tl.float32)
    scores = dot(query, tl.trans(rows), zero, WIDEN)
    if SLICES == 2:
        others = _load_rows(
            numbers, factors, seen, other, group_stride, channel_stride, factor_stride,
            CHANNELS, PLAIN, EACH, kind, PAIRS, WIDEN,
        )  # fmt: skip
        scores = dot(other_query, tl.trans(others), scores, WIDEN)
    if TAIL > 0:
        channel = tl.arange(0, BLOCK_T)
        ends = tl.load(
            tails[:, None] + (channel * tail_stride)[None, :],
            mask=seen[:, None] & (channel < TAIL)[None, :],
            other=0.0,
        )
        scores = dot(tail_query, tl.trans(ends), scores, WIDEN)
    scores = tl.where(seen[None, :], scores * scale, -float("inf"))
    high = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = tl.where(high == -float("inf"), 0.0, high)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = dot(weights.to(kind), rows, acc * decay[:, None], WIDEN)
    if TAIL > 0:
        tail_acc = dot(weights.to(kind), ends, tail_acc * decay[:, None], WIDEN)
    return acc, tail_acc, row_sum, high


@triton.jit(do_not_specialize=["tokens", "requests"])
def sparse_attention_kernel(
    query_ptr,
    cache_ptr,
    tail_ptr,
    scales_ptr,
    table_ptr,
    rows_ptr,
    rows_tail_ptr,
    rows_scales_ptr,
    rows_table_ptr,
    chosen_ptr,
    sinks_ptr,
    seq_lens_ptr,
    starts_ptr,
    out_ptr,
    found_ptr,
    sums_ptr,
    tokens,
    requests,
    query_stride,
    query_head_stride,
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
    table_stride,
    rows_block_stride,
    rows_slot_stride,
    rows_group_stride,
    rows_channel_stride,
    rows_tail_block_stride,
    rows_tail_slot_stride,
    rows_tail_channel_stride,
    rows_scale_block_stride,
    rows_scale_group_stride,
    rows_scale_slot_stride,
    rows_table_stride,
    chosen_stride,
    out_stride,
    out_head_stride,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    EVERY: tl.constexpr,
    KIND: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICES: tl.constexpr,
    EACH: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes BLOCK_M heads of a token, one of PARTS parts of its rows, and of their
    values one of SLICES slices of the channels.

    KIND: 0 no compressed rows, 1 those that are chosen, 2 all that are whole. With one part it
    writes ``out``; with several ``found`` [PARTS, T, HEADS, SIZE] and the base-2 logarithm of the
    sum of its weights, -inf where it had no rows, [PARTS, T, HEADS, SLICES].
    """
    CHANNELS: tl.constexpr = BLOCK_D // SLICES
    token = tl.program_id(0)
    head = tl.program_id(1) // SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.program_id(1) % SLICES
    part = tl.program_id(2)
    first = which * CHANNELS
    other = CHANNELS - first
    channel = first + tl.arange(0, CHANNELS)
    # The last channels, where they lie apart, are the last slice's.
    ends = SIZE - TAIL + tl.arange(0, BLOCK_T)
    real_channel = channel < SIZE - TAIL
    request, position = request_of(token, seq_lens_ptr, starts_ptr, requests, BLOCK_R)
    oldest = tl.maximum(0, position - WINDOW + 1)
    near = position + 1 - oldest  # 0 for padding: its position is -1
    sink = tl.load(sinks_ptr + head, mask=head < HEADS, other=0.0) * 1.4426950408889634
    depend(EARLY)
    far = near * 0
    if KIND == 1:
        rank = tl.arange(0, BLOCK_TOP)
        slots = tl.load(
            chosen_ptr + token.to(tl.int64) * chosen_stride + rank, mask=rank < TOP, other=0
        )
        far = tl.max(tl.where(slots > 0, rank + 1, 0), axis=0)
        far = tl.where(position < 0, 0, far)
    if KIND == 2:
        far = (position + 1) // EVERY
    # Tiles of the window, then of compressed rows.
    near_tiles = tl.cdiv(near, BLOCK_N)
    tiles = near_tiles + tl.cdiv(far, BLOCK_N)
    busy = tl.minimum(PARTS, tl.maximum(1, tiles * BLOCK_N // LEAST))
    begin = tiles * part // busy
    end = tl.minimum(tiles, tiles * (part + 1) // busy)
    if part >= busy:
        end = begin

    used = (head < HEADS)[:, None] & real_channel[None, :]
    source = query_ptr + token.to(tl.int64) * query_stride + head[:, None] * query_head_stride
    query = tl.load(source + channel[None, :], mask=used, other=0.0)
    other_query = query
    tail_query = query
    if SLICES == 2:
        others = other + tl.arange(0, CHANNELS)[None, :]
        mask = (head < HEADS)[:, None] & (others < SIZE - TAIL)
        other_query = tl.load(source + others, mask=mask, other=0.0)
    used_ends = (head < HEADS)[:, None] & (ends < SIZE)[None, :]
    if TAIL > 0:
        tail_query = tl.load(source + ends[None, :], mask=used_ends, other=0.0)
    tables = table_ptr + request.to(tl.int64) * table_stride
    rows_tables = rows_table_ptr + request.to(tl.int64) * rows_table_stride
    chosen = chosen_ptr + token.to(tl.int64) * chosen_stride
    acc = tl.zeros([BLOCK_M, CHANNELS], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    tail_acc = row_sum
    if TAIL > 0:
        tail_acc = tl.zeros([BLOCK_M, BLOCK_T], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    # Where rows are is known before a loop: a pipeline's loads that wait for loads do not overlap.
    entry = tl.arange(0, BLOCK_W)
    first_block = oldest // BLOCK_SIZE
    blocks = tl.load(
        tables + first_block + entry, mask=(first_block + entry) * BLOCK_SIZE <= position, other=0
    )
    for tile in range(begin, tl.minimum(end, near_tiles)):
        number = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = number < near
        place = oldest + number
        at = tl.where(seen, place // BLOCK_SIZE - first_block, 0)
        block, slot = tl.gather(blocks, at, axis=0).to(tl.int64), place % BLOCK_SIZE
        numbers = cache_ptr + block * block_stride + slot * slot_stride
        tails, factors = numbers, numbers
        if TAIL > 0:
            tails = tail_ptr + block * tail_block_stride + slot * tail_slot_stride
        if EACH > 0:
            factors = scales_ptr + block * scale_block_stride + slot * scale_slot_stride
        acc, tail_acc, row_sum, row_max = _attend(
            acc, tail_acc, row_sum, row_max, query, other_query, tail_query,
            numbers, tails, factors, seen, scale, first, other,
            group_stride, channel_stride, tail_channel_stride, scale_group_stride,
            CHANNELS, SLICES, SIZE, EACH, TAIL, BLOCK_T, PAIRS, WIDEN,
        )  # fmt: skip
    if KIND != 0:
        last = end - near_tiles
        for chunk in range(tl.maximum(begin - near_tiles, 0), last, CHUNK // BLOCK_N):
            line = chunk * BLOCK_N + tl.arange(0, CHUNK)
            if KIND == 1:
                places = tl.load(chosen + line, mask=line < far, other=0)
            else:
                places = tl.load(rows_tables + line // ROWS_BLOCK, mask=line < far, other=0)
                places = places * ROWS_BLOCK + line % ROWS_BLOCK
            for tile in range(chunk, tl.minimum(last, chunk + CHUNK // BLOCK_N)):
                number = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                slot = tl.gather(places, number - chunk * BLOCK_N, axis=0)
                seen = number < far
                if KIND == 1:
                    seen = seen & (slot > 0)
                block, slot = (slot // ROWS_BLOCK).to(tl.int64), slot % ROWS_BLOCK
                numbers = rows_ptr + block * rows_block_stride + slot * rows_slot_stride
                tails, factors = numbers, numbers
                if TAIL > 0:
                    tails = rows_tail_ptr + block * rows_tail_block_stride
                    tails += slot * rows_tail_slot_stride
                if EACH > 0:
                    factors = rows_scales_ptr + block * rows_scale_block_stride
                    factors += slot * rows_scale_slot_stride
                acc, tail_acc, row_sum, row_max = _attend(
                    acc, tail_acc, row_sum, row_max, query, other_query, tail_query,
                    numbers, tails, factors, seen, scale, first, other,
                    rows_group_stride, rows_channel_stride, rows_tail_channel_stride,
                    rows_scale_group_stride, CHANNELS, SLICES, SIZE, EACH, TAIL, BLOCK_T, PAIRS,
                    WIDEN,
                )  # fmt: skip
    if PARTS == 1:
        # A score without a value.
        high = tl.maximum(row_max, sink)
        row_sum = row_sum * tl.exp2(row_max - high) + tl.exp2(sink - high)
        factor = (tl.exp2(row_max - high) / row_sum)[:, None]
        target = out_ptr + token.to(tl.int64) * out_stride + head[:, None] * out_head_stride
        acc = tl.where(position < 0, 0.0, acc * factor).to(out_ptr.dtype.element_ty)
        tl.store(target + channel[None, :], acc, mask=used)
        if TAIL > 0:  # noqa: SIM102 - one is known to the compiler
            if which == SLICES - 1:
                tail_sum = tl.where(position < 0, 0.0, tail_acc * factor)
                tail_sum = tail_sum.to(out_ptr.dtype.element_ty)
                tl.store(target + ends[None, :], tail_sum, mask=used_ends)
    else:
        here = (part.to(tl.int64) * tokens + token) * HEADS + head
        place = sums_ptr + here * SLICES + which
        tl.store(place, row_max + tl.log2(row_sum), mask=head < HEADS)
        if begin < end:
            total = tl.where(row_sum == 0, 1.0, row_sum)[:, None]
            target = found_ptr + here[:, None] * SIZE
            tl.store(target + channel[None, :], acc / total, mask=used)
            if TAIL > 0:  # noqa: SIM102
                if which == SLICES - 1:
                    tl.store(target + ends[None, :], tail_acc / total, mask=used_ends)


@triton.jit(do_not_specialize=["tokens"])
def sparse_merge_kernel(
    found_ptr,
    sums_ptr,
    sinks_ptr,
    out_ptr,
    tokens,
    out_stride,
    out_head_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program merges BLOCK channels, all of one slice, of the parts of a head of a token, STEP
    at a time, in their order."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(2) * BLOCK // SLICE
    real_channel = channel < SIZE
    largest = tl.load(sinks_ptr + head) * 1.4426950408889634
    total = largest * 0 + 1.0
    some = total < 0.0  # padding has no rows
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    depend(EARLY)
    for start in range(0, PARTS, STEP):
        part = start + tl.arange(0, STEP)
        here = (part.to(tl.int64) * tokens + token) * HEADS + head
        place = sums_ptr + here * SLICES + which
        log_sum = tl.load(place, mask=part < PARTS, other=-float("inf"))
        real = log_sum > -float("inf")
        found = tl.load(
            found_ptr + here[:, None] * SIZE + channel[None, :],
            mask=real[:, None] & real_channel[None, :],
            other=0.0,
        )
        high = tl.maximum(largest, tl.max(log_sum, axis=0))
        weights = tl.exp2(log_sum - high)
        decay = tl.exp2(largest - high)
        acc = acc * decay + tl.sum(found * weights[:, None], axis=0)
        total = total * decay + tl.sum(weights, axis=0)
        some = some | (tl.max(log_sum, axis=0) > -float("inf"))
        largest = high
    target = out_ptr + token * out_stride + head * out_head_stride + channel
    acc = tl.where(some, acc / total, 0.0)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=real_channel)

# mypy: allow-untyped-defs, no-check-untyped-defs
"""The kernel that attends to the rows of a token, or to a part of them."""

import triton
import triton.language as tl

from reprise.ops.load_codes import plain
from reprise.ops.request_of import request_of
from reprise.ops.triton_util import depend, dot


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

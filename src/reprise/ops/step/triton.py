import functools

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.step.reference import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT
from reprise.ops.triton_util import cdiv, launch

_BLOCK = 128
_SEARCH = 10
"""Halvings until a token's request is found: one kernel for up to 1024 of them."""


def lay_out(
    numbers: Tensor,
    rows: Tensor,
    known: Tensor,
    query_start_loc: Tensor,
    tables: Tensor,
    block_sizes: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    draws: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    accepted: Tensor,
    fresh: Tensor,
    query_len: int,
) -> None:
    """Arguments as in the reference; all are contiguous but ``tables`` and ``slots``, whose first
    dimension may be strided."""
    _bind_lay_out(
        numbers, rows, known, query_start_loc, tables, block_sizes, token_ids, positions, draws,
        slots, seq_lens, accepted, fresh, query_len,
    )  # fmt: skip


def _bind_lay_out(*arguments):
    numbers, rows, _, _, tables, _, token_ids, _, _, slots, *_, query_len = arguments
    requests, tokens = rows.shape[0], token_ids.shape[0]
    grid = (cdiv(max(tokens, requests), _BLOCK),)
    options = {
        "NEXT_TOKENS": numbers.shape[0] - NEXT,
        "LIFETIMES": tables.shape[0],
        "QUERY_LEN": query_len,
        "SEARCH": max(_SEARCH, requests.bit_length()),
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }
    given = (
        *arguments[:-1], numbers.stride(0), tables.stride(0), tables.stride(1), slots.stride(0),
        requests, tokens,
    )  # fmt: skip
    return functools.partial(launch(lay_out_kernel, grid)(*given, **options), *given)


lay_out.bind = _bind_lay_out  # type: ignore[attr-defined]


@triton.jit(do_not_specialize=["requests", "tokens"])
def lay_out_kernel(
    numbers_ptr,
    rows_ptr,
    known_ptr,
    starts_ptr,
    tables_ptr,
    block_sizes_ptr,
    token_ids_ptr,
    positions_ptr,
    draws_ptr,
    slots_ptr,
    seq_lens_ptr,
    accepted_ptr,
    fresh_ptr,
    numbers_stride,
    lifetime_stride,
    table_stride,
    slots_stride,
    requests,
    tokens,
    NEXT_TOKENS: tl.constexpr,
    LIFETIMES: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK tokens and, if there are so many, BLOCK requests."""
    COMPUTED: tl.constexpr = 0
    LIMIT: tl.constexpr = 1
    PROMPT: tl.constexpr = 2
    ACCEPTED: tl.constexpr = 3
    NEXT: tl.constexpr = 4
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < tokens
    if QUERY_LEN > 0:
        request = tl.minimum(place // QUERY_LEN, requests - 1)
        offset = place - request * QUERY_LEN
        live = there
    else:
        # The last request that does not begin behind the token, and has tokens.
        low = tl.zeros([BLOCK], dtype=tl.int32)
        high = tl.zeros([BLOCK], dtype=tl.int32) + requests - 1
        for _ in tl.static_range(SEARCH):
            middle = (low + high) // 2
            ends = tl.load(starts_ptr + middle + 1)
            behind = (ends <= place) & (low < high)
            low = tl.where(behind, middle + 1, low)
            high = tl.where(behind, high, middle)
        request = tl.minimum(low, requests - 1)
        offset = place - tl.load(starts_ptr + request)
        live = there & (place < tl.load(starts_ptr + requests))
    row = tl.load(rows_ptr + request)
    start = tl.load(numbers_ptr + COMPUTED * numbers_stride + row)
    limit = tl.load(numbers_ptr + LIMIT * numbers_stride + row)
    ahead = offset - tl.load(known_ptr + request)
    take = tl.minimum(tl.maximum(ahead, 0), NEXT_TOKENS - 1)
    drafted = tl.load(numbers_ptr + (NEXT + take) * numbers_stride + row, mask=live, other=0)
    given = tl.load(token_ids_ptr + place, mask=live, other=0)
    token = tl.where(ahead >= 0, tl.maximum(drafted, 0), given)
    position = start + offset
    inside = live & (position < limit)
    position = tl.minimum(position, tl.maximum(limit - 1, 0))
    shown = tl.where(live, position, 0)
    prompt = tl.load(numbers_ptr + PROMPT * numbers_stride + row)
    tl.store(token_ids_ptr + place, tl.where(live, token, 0), mask=there)
    tl.store(positions_ptr + place, shown, mask=there)
    tl.store(draws_ptr + place, tl.where(live, shown + 1 - prompt, 0), mask=there)
    for number in tl.static_range(LIFETIMES):
        size = tl.load(block_sizes_ptr + number)
        entry = tables_ptr + number * lifetime_stride + request * table_stride + position // size
        block = tl.load(entry, mask=inside, other=0).to(tl.int64)
        slot = tl.where(inside, block * size + position % size, 0)
        tl.store(slots_ptr + number * slots_stride + place, slot, mask=there)

    real = place < requests
    row = tl.load(rows_ptr + place, mask=real, other=0)
    start = tl.load(numbers_ptr + COMPUTED * numbers_stride + row)
    limit = tl.load(numbers_ptr + LIMIT * numbers_stride + row)
    if QUERY_LEN > 0:
        count = tl.zeros([BLOCK], dtype=tl.int32) + QUERY_LEN
    else:
        begin = tl.load(starts_ptr + place, mask=real, other=0)
        count = tl.load(starts_ptr + place + 1, mask=real, other=0) - begin
    length = tl.where((start < limit) & (count > 0), start + count, 0)
    tl.store(seq_lens_ptr + place, length.to(tl.int32), mask=real)
    counted = tl.load(numbers_ptr + ACCEPTED * numbers_stride + row)
    tl.store(accepted_ptr + place, counted.to(tl.int32), mask=real)
    tl.store(fresh_ptr + place, start == 0, mask=real)


assert (COMPUTED, LIMIT, PROMPT, ACCEPTED, NEXT) == (0, 1, 2, 3, 4), "as the kernels have them"


def advance(
    numbers: Tensor,
    rows: Tensor,
    known: Tensor,
    first_draw: Tensor,
    emitted: Tensor,
    drawn: Tensor,
) -> None:
    """Arguments as in the reference; rows of ``emitted`` may be strided."""
    _bind_advance(numbers, rows, known, first_draw, emitted, drawn)


def _bind_advance(*arguments):
    numbers, rows, _, _, emitted, _ = arguments
    grid = (cdiv(rows.shape[0], _BLOCK),)
    strides = numbers.stride(0), emitted.stride(0), rows.shape[0]
    options = {"WIDTH": emitted.shape[1] - 1, "BLOCK": _BLOCK, "num_warps": 4}
    again = launch(advance_kernel, grid)(*arguments, *strides, **options)
    before = arguments[:-1]
    return lambda drawn: again(*before, drawn, *strides)


advance.bind = _bind_advance  # type: ignore[attr-defined]


@triton.jit(do_not_specialize=["requests"])
def advance_kernel(
    numbers_ptr,
    rows_ptr,
    known_ptr,
    first_draw_ptr,
    emitted_ptr,
    drawn_ptr,
    numbers_stride,
    emitted_stride,
    requests,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program moves BLOCK requests on."""
    COMPUTED: tl.constexpr = 0
    LIMIT: tl.constexpr = 1
    ACCEPTED: tl.constexpr = 3
    NEXT: tl.constexpr = 4
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = request < requests
    row = tl.load(rows_ptr + request, mask=real, other=0)
    owned = real & (row != 0)
    known = tl.load(known_ptr + request, mask=real, other=0)
    first = tl.load(first_draw_ptr + request, mask=real, other=0)
    there = tl.load(first_draw_ptr + request + 1, mask=real, other=0) - first
    counts = there > 0
    count = tl.zeros([BLOCK], dtype=tl.int64)
    last = tl.zeros([BLOCK], dtype=tl.int64)
    drafted = tl.zeros([BLOCK], dtype=tl.int64)
    for turn in tl.static_range(WIDTH):
        token = tl.load(drawn_ptr + first + turn, mask=real & (turn < there), other=-1)
        tl.store(
            emitted_ptr + request * emitted_stride + turn, tl.where(counts, token, -1), mask=real
        )
        last = tl.where(counts, token, last)
        count += counts.to(tl.int64)
        if turn + 1 < WIDTH:
            place = numbers_ptr + (NEXT + turn + 1) * numbers_stride + row
            draft = tl.load(place, mask=owned, other=-1)
            drafted += ((draft >= 0) & (turn + 1 < there)).to(tl.int64)
            tl.store(place, tl.zeros_like(draft) - 1, mask=owned)
            counts = counts & (turn + 1 < there) & (token == draft)
    tl.store(emitted_ptr + request * emitted_stride + WIDTH, drafted, mask=real)
    place = numbers_ptr + COMPUTED * numbers_stride + row
    computed = tl.load(place, mask=owned, other=0)
    limit = tl.load(numbers_ptr + LIMIT * numbers_stride + row, mask=owned, other=0)
    forward = tl.where(known == 0, count, known.to(tl.int64))
    tl.store(place, tl.minimum(computed + forward, limit), mask=owned)
    counted = tl.where(known == 0, count, 0)
    tl.store(numbers_ptr + ACCEPTED * numbers_stride + row, counted, mask=owned)
    tl.store(numbers_ptr + NEXT * numbers_stride + row, last, mask=owned & (there > 0))

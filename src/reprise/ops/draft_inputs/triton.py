import functools

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.draft_inputs.reference import MIN_P, TEMPERATURE, TOP_P
from reprise.ops.step.reference import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT
from reprise.ops.triton_util import cdiv, launch

_BLOCK = 128
_SEARCH = 10
"""Halvings until a token's request is found: one kernel for up to 1024 of them."""


def draft_inputs(
    integers: Tensor,
    floats: Tensor,
    step_rows: Tensor,
    known: Tensor,
    query_start_loc: Tensor,
    step_ids: Tensor,
    told: Tensor,
    chosen: Tensor,
    tables: Tensor,
    block_sizes: Tensor,
    shifted_ids: Tensor | None,
    last: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    accepted: Tensor,
    fresh: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    number: Tensor,
    width: int,
    back: int,
    greedy: bool,
) -> None:
    """Arguments as in the reference; all are contiguous but ``integers``, ``floats``, ``tables``
    and ``slots``, whose first dimension may be strided."""
    _bind(
        integers, floats, step_rows, known, query_start_loc, step_ids, told, chosen, tables,
        block_sizes, shifted_ids, last, rows, token_ids, positions, slots, seq_lens, accepted,
        fresh, temperature, top_k, top_p, min_p, seed, number, width, back, greedy,
    )  # fmt: skip


def _bind(*arguments):
    *tensors, width, back, greedy = arguments
    integers, floats, step_rows, _, _, step_ids, _, chosen, tables, _ = tensors[:10]
    shifted_ids, _, rows, _, _, slots = tensors[10:16]
    requests, tokens = step_rows.shape[0], step_ids.shape[0]
    ids, padded = 0 if shifted_ids is None else shifted_ids.shape[0], rows.shape[0]
    grid = (cdiv(max(ids, padded * width, 1), _BLOCK),)
    options = {
        "SEEDS": integers.shape[0] - 2,
        "LIFETIMES": tables.shape[0],
        "SHIFTED": shifted_ids is not None,
        "WIDTH": width,
        "BACK": back,
        "GREEDY": bool(greedy),
        "SEARCH": max(_SEARCH, requests.bit_length()),
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }
    given = (
        *tensors, integers.stride(0), floats.stride(0), tables.stride(0), tables.stride(1),
        slots.stride(0), requests, tokens, ids, chosen.shape[0], padded,
    )  # fmt: skip
    return functools.partial(launch(draft_inputs_kernel, grid)(*given, **options), *given)


draft_inputs.bind = _bind  # type: ignore[attr-defined]

assert (COMPUTED, LIMIT, PROMPT, ACCEPTED, NEXT) == (0, 1, 2, 3, 4), "as the kernel has them"
assert (TEMPERATURE, TOP_P, MIN_P) == (0, 1, 2), "as the kernel has them"


@triton.jit(do_not_specialize=["requests", "tokens", "ids", "chosen_count", "padded"])
def draft_inputs_kernel(
    integers_ptr,
    floats_ptr,
    step_rows_ptr,
    known_ptr,
    starts_ptr,
    step_ids_ptr,
    told_ptr,
    chosen_ptr,
    tables_ptr,
    block_sizes_ptr,
    shifted_ids_ptr,
    last_ptr,
    rows_ptr,
    token_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    accepted_ptr,
    fresh_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    number_ptr,
    integers_stride,
    floats_stride,
    lifetime_stride,
    table_stride,
    slots_stride,
    requests,
    tokens,
    ids,
    chosen_count,
    padded,
    SEEDS: tl.constexpr,
    LIFETIMES: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BACK: tl.constexpr,
    GREEDY: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK ids of the prefill, BLOCK tokens of the chain and, if there are so
    many, BLOCK of its requests."""
    COMPUTED: tl.constexpr = 0
    LIMIT: tl.constexpr = 1
    PROMPT: tl.constexpr = 2
    ACCEPTED: tl.constexpr = 3
    NEXT: tl.constexpr = 4
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    if SHIFTED:
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
        row = tl.load(step_rows_ptr + request)
        end = tl.load(starts_ptr + request) + tl.load(known_ptr + request) - 1
        end += tl.load(integers_ptr + ACCEPTED * integers_stride + row)
        told = tl.load(told_ptr + request)
        drawn = tl.load(integers_ptr + NEXT * integers_stride + row)
        following = tl.load(step_ids_ptr + place + 1, mask=place + 1 < tokens, other=0)
        shifted = tl.where(place == tl.maximum(end, 0), tl.where(told >= 0, told, drawn), following)
        shifted = tl.where(place < tokens, shifted, 0)
        tl.store(shifted_ids_ptr + place, shifted, mask=place < ids)

    there = place < padded * WIDTH
    request = place // WIDTH
    offset = place - request * WIDTH
    live = request < chosen_count
    number = tl.load(chosen_ptr + request, mask=live, other=0)
    row = tl.load(step_rows_ptr + number)
    end = tl.load(starts_ptr + number) + tl.load(known_ptr + number) - 1
    end += tl.load(integers_ptr + ACCEPTED * integers_stride + row)
    start = tl.maximum(tl.load(integers_ptr + COMPUTED * integers_stride + row) - BACK, 0)
    limit = tl.load(integers_ptr + LIMIT * integers_stride + row)
    newest = tl.load(integers_ptr + NEXT * integers_stride + row)
    before = tl.load(step_ids_ptr + tl.maximum(end, 0), mask=live, other=0)
    token = tl.where(offset < BACK, before, tl.where(offset == BACK, tl.maximum(newest, 0), 0))
    position = start + offset
    inside = live & (position < limit)
    position = tl.minimum(position, tl.maximum(limit - 1, 0))
    tl.store(token_ids_ptr + place, tl.where(live, token, 0), mask=there)
    tl.store(positions_ptr + place, tl.where(live, position, 0), mask=there)
    for each in tl.static_range(LIFETIMES):
        size = tl.load(block_sizes_ptr + each)
        entry = tables_ptr + each * lifetime_stride + row * table_stride + position // size
        block = tl.load(entry, mask=inside, other=0).to(tl.int64)
        slot = tl.where(inside, block * size + position % size, 0)
        tl.store(slots_ptr + each * slots_stride + place, slot, mask=there)

    real = place < padded
    live = place < chosen_count
    number = tl.load(chosen_ptr + place, mask=live, other=0)
    row = tl.load(step_rows_ptr + number)
    end = tl.load(starts_ptr + number) + tl.load(known_ptr + number) - 1
    counted = tl.load(integers_ptr + ACCEPTED * integers_stride + row)
    start = tl.maximum(tl.load(integers_ptr + COMPUTED * integers_stride + row) - BACK, 0)
    limit = tl.load(integers_ptr + LIMIT * integers_stride + row)
    first = tl.minimum(start + BACK, tl.maximum(limit - 1, 0)) + 1
    first -= tl.load(integers_ptr + PROMPT * integers_stride + row)
    length = tl.where(start < limit, start + WIDTH, 0)
    tl.store(rows_ptr + place, tl.where(live, row, 0), mask=real)
    tl.store(last_ptr + place, tl.where(live, tl.maximum(end + counted, 0), 0), mask=real)
    tl.store(seq_lens_ptr + place, tl.where(live, length, 0).to(tl.int32), mask=real)
    tl.store(accepted_ptr + place, tl.where(live, counted, 0).to(tl.int32), mask=real)
    tl.store(fresh_ptr + place, live & (start == 0), mask=real)
    tl.store(number_ptr + place, tl.where(live, first, 0), mask=real)
    seed = tl.load(integers_ptr + SEEDS * integers_stride + row)
    top_k = tl.load(integers_ptr + (SEEDS + 1) * integers_stride + row)
    temperature = tl.load(floats_ptr + row)
    if GREEDY:
        temperature = tl.zeros_like(temperature)
    top_p = tl.load(floats_ptr + floats_stride + row)
    min_p = tl.load(floats_ptr + 2 * floats_stride + row)
    tl.store(seed_ptr + place, tl.where(live, seed, 0), mask=real)
    tl.store(top_k_ptr + place, tl.where(live, top_k, 0).to(tl.int32), mask=real)
    tl.store(temperature_ptr + place, tl.where(live, temperature, 0), mask=real)
    tl.store(top_p_ptr + place, tl.where(live, top_p, 0), mask=real)
    tl.store(min_p_ptr + place, tl.where(live, min_p, 0), mask=real)

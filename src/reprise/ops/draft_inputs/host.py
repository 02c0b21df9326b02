"""The op in numpy: on a host's memory a call of torch costs several times as much as its work."""

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from reprise.ops.draft_inputs.reference import MIN_P, TEMPERATURE, TOP_P
from reprise.ops.step.reference import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT

Array = np.ndarray[Any, Any]


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
    """Arguments as in the reference."""
    _bind(
        integers, floats, step_rows, known, query_start_loc, step_ids, told, chosen, tables,
        block_sizes, shifted_ids, last, rows, token_ids, positions, slots, seq_lens, accepted,
        fresh, temperature, top_k, top_p, min_p, seed, number, width, back, greedy,
    )  # fmt: skip


def _bind(*arguments: Any) -> partial[None]:
    *tensors, width, back, greedy = arguments
    arrays: Any = (None if each is None else each.numpy() for each in tensors)
    again = partial(_write, *arrays, width, back, greedy)  # type: ignore[call-arg]
    again()
    return again


draft_inputs.bind = _bind  # type: ignore[attr-defined]


def _write(
    integers: Array, floats: Array, step_rows: Array, known: Array, query_start_loc: Array,
    step_ids: Array, told: Array, chosen: Array, tables: Array, block_sizes: Array,
    shifted_ids: Array | None, last: Array, rows: Array, token_ids: Array, positions: Array,
    slots: Array, seq_lens: Array, accepted: Array, fresh: Array, temperature: Array, top_k: Array,
    top_p: Array, min_p: Array, seed: Array, number: Array, width: int, back: int, greedy: bool,
) -> None:  # fmt: skip
    tokens, count = len(step_ids), len(chosen)
    state = integers.take(step_rows, axis=1)
    ends = np.maximum(query_start_loc[:-1] + known + state[ACCEPTED] - 1, 0)
    if shifted_ids is not None:
        shifted_ids[: tokens - 1] = step_ids[1:]
        shifted_ids[tokens - 1 :] = 0
        shifted_ids[ends] = np.where(told >= 0, told, state[NEXT])
    if count < len(rows):
        for each in (
            last, rows, seq_lens, accepted, fresh, temperature, top_k, top_p, min_p, seed, number,
        ):  # fmt: skip
            each[count:] = 0
        for each in (token_ids, positions, slots):
            each[..., count * width :] = 0
    row = rows[:count] = step_rows[chosen]
    state = state.take(chosen, axis=1)
    last[:count] = ends[chosen]
    computed, limit = state[COMPUTED], state[LIMIT]
    start, highest = np.maximum(computed - back, 0), np.maximum(limit - 1, 0)
    ids = token_ids[: count * width].reshape(count, width)
    ids[:] = 0
    if back:
        ids[:, 0] = step_ids[last[:count]]
    if width > back:
        ids[:, back] = np.maximum(state[NEXT], 0)
    place = start[:, None] + np.arange(width)
    inside = place < limit[:, None]
    np.minimum(place, highest[:, None], out=place)
    positions[: count * width] = place.reshape(-1)
    for table, size, slot in zip(tables, block_sizes.tolist(), slots, strict=True):
        block = table[row[:, None], place // size].astype(np.int64)
        slot[: count * width] = ((block * size + place % size) * inside).reshape(-1)
    seq_lens[:count] = (start + width) * (start < limit)
    accepted[:count] = state[ACCEPTED]
    np.equal(start, 0, out=fresh[:count])
    draws = floats.take(row, axis=1)
    temperature[:count] = 0 if greedy else draws[TEMPERATURE]
    top_p[:count], min_p[:count] = draws[TOP_P], draws[MIN_P]
    seed[:count], top_k[:count] = state[-2], state[-1]
    number[:count] = np.minimum(start + back, highest) + 1 - state[PROMPT]

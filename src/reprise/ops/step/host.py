"""Both ops in numpy: on a host's memory a call of torch costs several times as much as its work."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from reprise.ops.step.reference import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT

Array = np.ndarray[Any, Any]


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
    """Arguments as in the reference."""
    tensors = (
        numbers, rows, known, query_start_loc, tables, block_sizes, token_ids, positions, draws,
        slots, seq_lens, accepted, fresh,
    )  # fmt: skip
    _lay_out([each.numpy() for each in tensors], query_len)


def _bind_lay_out(*arguments: Any) -> Callable[[], None]:
    *tensors, query_len = arguments
    arrays = [each.numpy() for each in tensors]
    again: Callable[[], None]
    if query_len != 1 or arrays[2].any():
        again = partial(_lay_out, arrays, query_len)
    elif len(arrays[1]) == 1:
        again = _next_token(*arrays)
    else:
        again = _next_tokens(*arrays)
    again()
    return again


lay_out.bind = _bind_lay_out  # type: ignore[attr-defined]


def _lay_out(arrays: Sequence[Array], query_len: int) -> None:
    (
        numbers, rows, known, query_start_loc, tables, block_sizes, token_ids, positions, draws,
        slots, seq_lens, accepted, fresh,
    ) = arrays  # fmt: skip
    requests, tokens = len(rows), len(token_ids)
    start, limit = numbers[COMPUTED, rows], numbers[LIMIT, rows]
    if query_len:
        request = np.repeat(np.arange(requests), query_len)
        count: Any = query_len
        offset = np.tile(np.arange(query_len), requests)
        live = tokens
    else:
        count = query_start_loc[1:] - query_start_loc[:-1]
        request = np.repeat(np.arange(requests), count)
        live = len(request)
        offset = np.arange(live) - query_start_loc[request]
        for each in (token_ids, positions, draws):
            each[live:] = 0
        slots[:, live:] = 0
    row = rows[request]
    ahead = offset - known[request]
    take = np.clip(ahead, 0, len(numbers) - NEXT - 1)
    np.copyto(token_ids[:live], np.maximum(numbers[NEXT + take, row], 0), where=ahead >= 0)
    position = start[request] + offset
    limits = limit[request]
    inside = position < limits
    np.minimum(position, np.maximum(limits - 1, 0), out=position)
    positions[:live] = position
    np.subtract(position + 1, numbers[PROMPT, row], out=draws[:live])
    for table, size, slot in zip(tables, block_sizes.tolist(), slots, strict=True):
        columns, within = np.divmod(position, size)
        slot[:live] = (table[request, columns].astype(np.int64) * size + within) * inside
    seq_lens[:] = (start + count) * ((start < limit) & (np.asarray(count) > 0))
    accepted[:] = numbers[ACCEPTED, rows]
    np.equal(start, 0, out=fresh)


def _next_token(
    numbers: Array, rows: Array, known: Array, query_start_loc: Array, tables: Array,
    block_sizes: Array, token_ids: Array, positions: Array, draws: Array, slots: Array,
    seq_lens: Array, accepted: Array, fresh: Array,
) -> Callable[[], None]:  # fmt: skip
    """:func:`lay_out` of a step in which one request computes its newest token: numbers, since
    an array of one costs twenty times as much."""
    state = numbers[:, rows[0]]
    limit, prompt = int(state[LIMIT]), int(state[PROMPT])
    lifetimes = list(zip(tables[:, 0], block_sizes.tolist(), slots, strict=True))

    def again() -> None:
        computed, newest = state.item(COMPUTED), state.item(NEXT)
        inside = computed < limit
        position = computed if inside else max(limit - 1, 0)
        token_ids[0] = newest if newest > 0 else 0
        positions[0] = position
        draws[0] = position + 1 - prompt
        seq_lens[0] = computed + 1 if inside else 0
        accepted[0] = state[ACCEPTED]
        fresh[0] = computed == 0
        for table, size, slot in lifetimes:
            slot[0] = table.item(position // size) * size + position % size if inside else 0

    return again


def _next_tokens(
    numbers: Array, rows: Array, known: Array, query_start_loc: Array, tables: Array,
    block_sizes: Array, token_ids: Array, positions: Array, draws: Array, slots: Array,
    seq_lens: Array, accepted: Array, fresh: Array,
) -> Callable[[], None]:  # fmt: skip
    """:func:`lay_out` of a step in which each request computes its newest token."""
    state = numbers[:, rows]
    limit, prompt = state[LIMIT], state[PROMPT] - 1
    highest = np.maximum(limit - 1, 0)
    width = tables.shape[2]
    begins = np.arange(0, len(rows) * width, width)  # of each row in a flat table
    lifetimes = [
        (table.reshape(-1), size, slot)
        for table, size, slot in zip(tables, block_sizes.tolist(), slots, strict=True)
    ]

    def again() -> None:
        numbers.take(rows, axis=1, out=state, mode="clip")
        computed = state[COMPUTED]
        inside = computed < limit
        np.minimum(computed, highest, out=positions)
        np.subtract(positions, prompt, out=draws)
        np.maximum(state[NEXT], 0, out=token_ids)
        seq_lens[:] = (computed + 1) * inside
        accepted[:] = state[ACCEPTED]
        np.equal(computed, 0, out=fresh)
        for table, size, slot in lifetimes:
            columns = positions // size
            # block * size + position % size
            np.subtract(table.take(columns + begins), columns, out=slot)
            slot *= size
            slot += positions
            slot *= inside

    return again


def advance(
    numbers: Tensor,
    rows: Tensor,
    known: Tensor,
    first_draw: Tensor,
    emitted: Tensor,
    drawn: Tensor,
) -> None:
    """Arguments as in the reference."""
    _bind_advance(numbers, rows, known, first_draw, emitted, drawn)


def _bind_advance(*arguments: Any) -> Callable[[Tensor], None]:
    *tensors, drawn = arguments
    arrays = [each.numpy() for each in tensors]
    _, rows, known, _, emitted = arrays
    again: Callable[[Tensor], None]
    if emitted.shape[1] == 2 and len(drawn) == len(rows) and not known.any() and rows.all():
        again = _take_one_each(*arrays)
    else:
        again = partial(_advance, arrays)
    again(drawn)
    return again


advance.bind = _bind_advance  # type: ignore[attr-defined]


def _take_one_each(
    numbers: Array, rows: Array, known: Array, first_draw: Array, emitted: Array
) -> Callable[[Tensor], None]:
    """:func:`advance` of a step in which each request computes its newest token, and no more."""
    numbers[ACCEPTED, rows] = 1
    drafted = emitted[:, 1]
    first, count = int(rows[0]), len(rows)
    side_by_side = (rows == np.arange(first, first + count)).all()
    if not side_by_side:

        def again(drawn: Tensor) -> None:
            tokens = drawn.numpy()
            emitted[:, 0] = tokens
            drafted[:] = 0
            numbers[NEXT, rows] = tokens
            numbers[COMPUTED, rows] = np.minimum(numbers[COMPUTED, rows] + 1, numbers[LIMIT, rows])

        return again

    state = numbers[:, first : first + count]  # not a copy
    computed, limit, newest, out = state[COMPUTED], state[LIMIT], state[NEXT], emitted[:, 0]

    def again_beside(drawn: Tensor) -> None:
        out[:] = newest[:] = drawn.numpy()
        drafted[:] = 0
        np.add(computed, 1, out=computed)
        np.minimum(computed, limit, out=computed)

    return again_beside


def _advance(arrays: Sequence[Array], drawn: Tensor) -> None:
    numbers, rows, known, first_draw, emitted = arrays
    there = first_draw[1:] - first_draw[:-1]
    counts = there > 0
    count = np.zeros(len(rows), dtype=np.int64)
    last = numbers[NEXT, rows]
    source = drawn.numpy() if len(drawn) else np.full(1, -1, dtype=np.int64)
    width = emitted.shape[1] - 1
    drafted = emitted[:, width]
    drafted[:] = 0
    for turn in range(width):
        token = source.take(first_draw[:-1] + turn, mode="clip")
        emitted[:, turn] = np.where(counts, token, -1)
        last = np.where(counts, token, last)
        count += counts
        if turn + 1 < width:
            drafts = numbers[NEXT + turn + 1, rows]
            drafted += (turn + 1 < there) & (drafts >= 0)
            counts &= (turn + 1 < there) & (token == drafts)
    owned = rows != 0
    decodes = (known == 0) & owned
    forward = numbers[COMPUTED, rows] + np.where(decodes, count, known)
    numbers[COMPUTED, rows] = np.minimum(forward, numbers[LIMIT, rows])
    numbers[ACCEPTED, rows] = np.where(decodes, count, 0)
    numbers[NEXT, rows] = last
    numbers[NEXT + 1 :, rows] = np.where(owned, -1, 0)

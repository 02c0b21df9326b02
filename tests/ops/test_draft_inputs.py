"""What drafts read behind a step, against loops over its requests and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reprise.ops import draft_inputs
from reprise.ops.step import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT
from reprise.platforms import Platform

ROWS, COLUMNS, DRAFTS = 6, 9, 3
SIZES = (4, 2)
KINDS = {
    "last": torch.int64, "rows": torch.int64, "token_ids": torch.int64, "positions": torch.int64,
    "slots": torch.int64, "seq_lens": torch.int32, "accepted": torch.int32, "fresh": torch.bool,
    "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32,
    "min_p": torch.float32, "seed": torch.int64, "number": torch.int64,
}  # fmt: skip


def on(platform: Platform, values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=platform.device)


@pytest.mark.parametrize("name", list(draft_inputs.implementations))
@settings(max_examples=30)
@given(data=st.data())
def test_inputs_follow_from_where_rows_stand(
    implementation: Callable[..., Any], platform: Platform, name: str, data: st.DataObject
) -> None:
    function = implementation(draft_inputs, name)
    shifted, greedy = data.draw(st.booleans()), data.draw(st.booleans())
    back, width = (
        (0, data.draw(st.integers(1, 3))) if shifted else (1, data.draw(st.integers(2, 4)))
    )
    step_rows = data.draw(st.permutations(range(1, ROWS)))[: data.draw(st.integers(1, ROWS - 1))]
    integers = [[0] * ROWS for _ in range(NEXT + 1 + DRAFTS + 2)]
    floats = [[number + row / 8 for row in range(ROWS)] for number in range(6)]
    for row in range(1, ROWS):
        limit = integers[LIMIT][row] = data.draw(st.integers(2, 16))
        integers[PROMPT][row] = data.draw(st.integers(1, limit))
        integers[COMPUTED][row] = data.draw(st.integers(0, limit))
        for each in range(NEXT, len(integers)):
            integers[each][row] = data.draw(st.integers(0, 30))
    known, counts, told, chosen, ids = [], [], [], [], []
    for number, row in enumerate(step_rows):
        known.append(data.draw(st.integers(0, 3)))
        counts.append(known[-1] or 1 + DRAFTS)
        integers[ACCEPTED][row] = 0 if known[-1] else data.draw(st.integers(1, 1 + DRAFTS))
        draws = not known[-1] or data.draw(st.booleans())
        told.append(-1 if draws else 90 + number)
        chosen += [number] * draws
        ids += [10 * number + each for each in range(counts[-1])]
    chosen = data.draw(st.sampled_from([chosen, chosen[1:], chosen[::-1]]))
    starts = [sum(counts[:each]) for each in range(len(counts) + 1)]
    padding, more = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    most = len(chosen) + padding
    tables = [[[data.draw(st.integers(1, 50)) for _ in range(COLUMNS)] for _ in range(ROWS)]
              for _ in SIZES]  # fmt: skip

    ends = [start + (known[number] or integers[ACCEPTED][step_rows[number]]) - 1
            for number, start in enumerate(starts[:-1])]  # fmt: skip
    right: dict[str, list[Any]] = {name: [] for name in KINDS}
    right["slots"] = [[] for _ in SIZES]
    for number in chosen:
        row = step_rows[number]
        limit, begin = integers[LIMIT][row], max(integers[COMPUTED][row] - back, 0)
        newest = integers[NEXT][row]
        tokens = ([ids[ends[number]], newest] if back else [newest]) + [0] * width
        right["token_ids"] += tokens[:width]
        for position in range(begin, begin + width):
            shown = min(position, limit - 1)
            right["positions"].append(shown)
            for slots, table, size in zip(right["slots"], tables, SIZES, strict=True):
                slot = table[row][shown // size] * size + shown % size
                slots.append(slot if position < limit else 0)
        draws_of = {
            "temperature": 0.0 if greedy else floats[0][row], "top_p": floats[1][row],
            "min_p": floats[2][row], "seed": integers[-2][row], "top_k": integers[-1][row],
            "number": min(begin + back, limit - 1) + 1 - integers[PROMPT][row],
            "last": ends[number], "rows": row, "fresh": begin == 0,
            "accepted": integers[ACCEPTED][row],
            "seq_lens": begin + width if begin < limit else 0,
        }  # fmt: skip
        for key, value in draws_of.items():
            right[key].append(value)
    shifted_right = [*ids[1:], 0] + [0] * more
    for number, end in enumerate(ends):
        behind = integers[NEXT][step_rows[number]]
        shifted_right[end] = behind if told[number] < 0 else told[number]

    sizes = {"token_ids": (most * width,), "positions": (most * width,),
             "slots": (len(SIZES), most * width)}  # fmt: skip
    out = {
        key: torch.full(sizes.get(key, (most,)), 77, device=platform.device).to(kind)
        for key, kind in KINDS.items()
    }
    moved = torch.full((len(ids) + more,), 77, device=platform.device) if shifted else None
    arguments = (
        on(platform, integers), on(platform, floats, torch.float32), on(platform, step_rows),
        on(platform, known, torch.int32), on(platform, starts, torch.int32), on(platform, ids),
        on(platform, told), on(platform, chosen), on(platform, tables, torch.int32),
        on(platform, SIZES), moved, *out.values(), width, back, greedy,
    )  # fmt: skip

    def check() -> None:
        for key, got in out.items():
            zeros = [0] * (padding * width if key in sizes else padding)
            if key == "slots":
                assert got.tolist() == [each + zeros for each in right[key]]
            else:
                assert got.tolist() == right[key] + zeros, key
        if moved is not None:
            assert moved.tolist() == shifted_right

    if hasattr(function, "bind"):
        again = function.bind(*arguments)
        check()
        for each in out.values():
            each.fill_(1)
        again()
    else:
        function(*arguments)
    check()

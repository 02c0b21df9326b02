"""What a step's tensors hold, against a loop over its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from reprise.cache import one_table
from reprise.platforms import Platform
from reprise.platforms.cpu import CpuPlatform
from reprise.runner.buffers import ADMISSIONS, EDITS, StepBuffers
from reprise.sampling_params import SamplingParams
from reprise.shape import StepShape
from reprise.step import NULL_ROW, Admission, Step, TableEdit

BLOCK, MAX_BLOCKS, MAX_REQUESTS, MAX_TOKENS = 4, 6, 5, 40
LIMIT = BLOCK * (MAX_BLOCKS - 1)
"""Most tokens that are computed; drafts may lie behind them."""
PARAMS = SamplingParams()


SHARED = st.sampled_from([None, False])
"""Whether the device reads the host's side; False makes a CPU copy as an accelerator must."""
LENGTHS = st.integers(1, 12)


@dataclass
class Request:
    """What a row should be."""

    row: int
    token_ids: list[int]
    """Those that are known, and those that were drawn."""
    known: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    sent: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return self.computed >= self.known


def make(
    platform: Platform, shared: bool | None, num_drafts: int = 0, spare: int = 0
) -> StepBuffers:
    longest, layout = (MAX_BLOCKS + spare) * BLOCK, one_table(9, BLOCK)
    return StepBuffers(MAX_TOKENS, MAX_REQUESTS, longest, layout, platform, shared, num_drafts)


@dataclass
class World:
    buffers: StepBuffers
    requests: dict[int, Request] = field(default_factory=dict)
    """By row."""
    next_block: int = 1
    next_token: int = 10

    def admit(self, row: int, length: int, cached: int = 0) -> Admission:
        ids = list(range(self.next_token, self.next_token + length))
        self.next_token += length
        self.requests[row] = Request(row, ids, length, cached)
        return Admission(row, f"{row}", cached, ids, length, LIMIT, PARAMS, 7 * row, frozenset())

    def step(self, rows: list[int], counts: list[int], admitted: list[Admission]) -> Step:
        """Rows of decodes first; counts of the others."""
        requests = [self.requests[row] for row in rows]
        drafts = self.buffers.rows.num_drafts
        decodes = sum(each.decodes for each in requests)
        counts = [1] * decodes + counts
        edits = []
        for each, count in zip(requests, counts, strict=True):
            end = min(each.computed + count + (drafts if each.decodes else 0), LIMIT)
            missing = -(-end // BLOCK) - len(each.blocks)
            if missing > 0:
                new = list(range(self.next_block, self.next_block + missing))
                self.next_block += missing
                each.blocks += new
                edits.append(TableEdit(each.row, each.sent, new))
                each.sent = len(each.blocks)
        drafted = [drafts] * decodes + [0] * (len(rows) - decodes)
        samples = [
            each.decodes or each.computed + count == each.known
            for each, count in zip(requests, counts, strict=True)
        ]
        tokens = sum(counts) + sum(drafted)
        return Step(0, rows, counts, drafted, samples, decodes, tokens, admitted, (edits,))


def check(world: World, step: Step, padded: StepShape) -> None:
    buffers = world.buffers
    input_ids, positions, slots, starts, lengths, draws = [], [], [], [0], [], []
    for number, row in enumerate(step.rows):
        request = world.requests[row]
        ids = request.token_ids[request.computed : request.computed + step.counts[number]]
        if number < step.num_decodes:
            ids = [request.token_ids[request.computed], *request.drafts]
        input_ids += ids
        for position in range(request.computed, request.computed + len(ids)):
            positions.append(min(position, LIMIT - 1))
            draws.append(min(position, LIMIT - 1) + 1 - request.known)
            block = request.blocks[position // BLOCK] if position < LIMIT else 0
            slots.append(block * BLOCK + position % BLOCK if position < LIMIT else 0)
        starts.append(len(positions))
        lengths.append(request.computed + len(ids))
    more, spare = padded.num_tokens - len(positions), padded.num_requests - len(step.rows)
    batch = buffers.batch(padded.num_tokens, padded.num_requests, padded.query_len)
    assert batch.token_ids.tolist() == input_ids + [0] * more
    assert batch.positions.tolist() == positions + [0] * more
    assert batch.tables[0].slots.tolist() == slots + [0] * more
    assert batch.query_start_loc.tolist() == starts + [starts[-1]] * spare
    assert batch.seq_lens.tolist() == lengths + [0] * spare
    assert batch.rows.tolist() == [*step.rows] + [NULL_ROW] * spare
    assert buffers.draws[: len(draws)].tolist() == draws
    for row, table in zip(batch.rows.tolist(), batch.tables[0].blocks.tolist(), strict=True):
        owned = world.requests[row].blocks if row else [0] * MAX_BLOCKS
        assert table[: len(owned)] == owned
    chosen = buffers.sampling_rows()
    last = [
        place
        for number, samples in enumerate(step.samples)
        for place in range(starts[number + 1] - 1 - step.drafts[number], starts[number + 1])
        if samples
    ]
    assert (list(range(step.num_tokens)) if chosen is None else chosen.tolist()) == last


@settings(max_examples=100)
@given(data=st.data())
def test_random_steps(platform: Platform, data: st.DataObject) -> None:
    """Prompts in chunks, prefix hits, decodes, requests that come and go, the same rows again;
    what was drawn is never told to the buffers but on the device."""
    drafts = data.draw(st.sampled_from([0, 0, 1, 3]))
    buffers = make(platform, data.draw(SHARED), drafts, spare=1)
    world = World(buffers)
    poison(buffers)
    for _ in range(data.draw(st.integers(1, 20))):
        admitted = []
        free = [row for row in range(1, MAX_REQUESTS + 1) if row not in world.requests]
        for row in free[: data.draw(st.integers(0, 2))]:
            length = data.draw(LENGTHS)
            admitted.append(world.admit(row, length, data.draw(st.integers(0, length - 1))))
        if not world.requests:
            continue
        rows = [row for row, each in world.requests.items() if each.decodes]
        budget, counts = MAX_TOKENS - len(rows) * (1 + drafts), []
        for row, each in world.requests.items():
            left = min(each.known - each.computed, budget)
            if left > 0:
                rows.append(row)
                counts.append(data.draw(st.integers(1, left)))
                budget -= counts[-1]
        step = world.step(rows, counts, admitted)
        shape = step.shape
        padded = shape
        if data.draw(st.booleans()):
            size = data.draw(st.integers(shape.num_requests, MAX_REQUESTS))
            tokens = size * shape.query_len
            padded = StepShape.decode(size, shape.query_len)
            if shape.phase == "mixed":
                tokens = data.draw(st.integers(shape.num_tokens, MAX_TOKENS))
                padded = StepShape.mixed(tokens, size)
        buffers.fill(step, shape, padded)
        check(world, step, padded)

        drawn = []
        expected = []
        for number, row in enumerate(step.rows):
            request = world.requests[row]
            there = 1 + step.drafts[number] if step.samples[number] else 0
            tokens = [data.draw(st.integers(100, 103)) for _ in range(there)]
            drawn += tokens
            count = min(there, 1)
            while 0 < count < there and request.drafts[count - 1] == tokens[count - 1]:
                count += 1
            expected.append([*tokens[:count], *([-1] * (1 + drafts - count)), step.drafts[number]])
            request.token_ids += tokens[:count]
            request.computed += count if number < step.num_decodes else step.counts[number]
        device = torch.tensor(drawn, dtype=torch.int64, device=platform.device)
        assert buffers.advance(device).tolist() == expected
        for row in rows:
            request = world.requests[row]
            over = request.computed + 1 + drafts >= LIMIT
            if over or data.draw(st.integers(0, 6)) == 0:
                del world.requests[row]
                continue
            request.drafts = [data.draw(st.integers(100, 103)) for _ in range(drafts)]
            if drafts:
                place = torch.tensor(request.drafts, device=platform.device)
                buffers.rows.numbers[-drafts:, row] = place


def poison(buffers: StepBuffers) -> None:
    """Rows that nobody has hold anything."""
    buffers.rows.integers[:, 1:] = -77
    buffers.rows.tables[:, 1:] = 99
    buffers.block_tables.fill_(98)


@pytest.mark.parametrize("shared", [None, False])
def test_tables_that_were_overwritten_are_gathered_again(
    platform: Platform, shared: bool | None
) -> None:
    buffers = make(platform, shared)
    world = World(buffers)
    admitted = [world.admit(row, 8) for row in (1, 2, 3)]
    addresses = {name: each.data_ptr() for name, each in buffers.views(8, 3).items()}
    for rows in ([1, 2, 3], [3, 1]):
        step = world.step(rows, [4] * len(rows), admitted)
        admitted = []
        buffers.block_tables.fill_(-1)
        buffers.forget()
        buffers.fill(step, step.shape, step.shape)
        check(world, step, step.shape)
        buffers.advance(torch.ones(sum(step.samples), dtype=torch.int64, device=platform.device))
        for row in rows:
            world.requests[row].computed += 4
    assert {name: each.data_ptr() for name, each in buffers.views(8, 3).items()} == addresses
    assert all(isinstance(each, torch.Tensor) for each in buffers.views(8, 3).values())


def test_more_than_travels_with_a_step(platform: Platform) -> None:
    """New blocks, and new requests."""
    count = EDITS // 2 + 1
    most = 2 * ADMISSIONS
    layout = one_table(9, BLOCK)
    buffers = StepBuffers(most, most, (count + 1) * BLOCK, layout, platform, shared=False)
    world = World(buffers)
    admitted = [world.admit(row, 3) for row in range(1, ADMISSIONS + 2)]
    rows = [each.row for each in admitted]
    step = world.step(rows, [1] * len(rows), admitted)
    edits = [TableEdit(row, 1, list(range(1000 * row, 1000 * row + count))) for row in (1, 2)]
    step.edits = ([*step.edits[0], *edits],)
    buffers.fill(step, step.shape, step.shape)
    assert buffers.seq_lens.device[: len(rows)].tolist() == [1] * len(rows)
    for row in (1, 2):
        assert buffers.block_tables[0, row - 1, 1 : count + 1].tolist() == list(
            edits[row - 1].blocks
        )


@pytest.fixture
def uploads(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many copies to the device there were."""
    count = 0
    upload = type(platform).upload

    def counted(self: Platform, *arguments: torch.Tensor) -> None:
        nonlocal count
        count += 1
        upload(self, *arguments)

    monkeypatch.setattr(type(platform), "upload", counted)
    return lambda: count


def test_a_step_takes_one_copy_and_a_decode_like_the_last_one_none(
    platform: Platform, uploads: Callable[[], int]
) -> None:
    buffers = make(platform, shared=False)
    world = World(buffers)
    begun = uploads()

    def copies(step: Step) -> int:
        before = uploads()
        buffers.fill(step, step.shape, step.shape)
        check(world, step, step.shape)
        tokens = torch.full((len(step.rows),), 9, device=platform.device)
        buffers.advance(tokens)
        for row in step.rows:
            world.requests[row].computed += step.counts[list(step.rows).index(row)]
            world.requests[row].token_ids.append(9)
        return uploads() - before

    assert copies(world.step([1, 2], [5, 5], [world.admit(row, 5) for row in (1, 2)])) == 1
    assert copies(world.step([1, 2], [], [])) == 1  # other numbers of tokens
    assert [copies(world.step([1, 2], [], [])) for _ in range(3)] == [0, 0, 1]  # a block begins
    assert uploads() - begun == 3


class _Pins(CpuPlatform):
    """Copies only what is page-locked without the host having to wait."""

    pins_memory = True

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.waited = 0
        self.copies = 0

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.copies += 1
        self.waited += source.data_ptr() not in self.pinned
        super().upload(source, target)


def test_the_host_waits_for_no_copy_of_a_made_up_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory that is not page-locked a driver copies when the device has come so far: behind
    the comparison before this one."""
    platform = _Pins()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        platform.pinned.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    buffers = make(platform, None)
    platform.copies = 0
    table = np.arange(1, 1 + 2 * MAX_BLOCKS, dtype=np.int32).reshape(2, MAX_BLOCKS)
    buffers.fill_rows(
        np.array([3, 1]), np.array([9, 5]), [table], np.arange(4), np.array([3, 1]),
        np.array([0, 0]),
    )  # fmt: skip
    buffers.fill_padding(StepShape.mixed(4, 2), StepShape.mixed(8, 4))
    assert platform.copies > 0
    assert platform.waited == 0
    assert buffers.block_tables[0, :2].tolist() == table.tolist()
    assert not buffers.block_tables[0, 2:4].any()


@pytest.mark.parametrize("together", [True, False])
def test_a_made_up_step_and_its_padding_are_sent_in_one_piece(together: bool) -> None:
    """The host knows all of it; behind a step of requests padding is sent array by array."""
    platform = _Pins()
    platform.pins_memory = False
    buffers = make(platform, False)
    for name, each in buffers.arrays().items():
        if name != "block_sizes":
            each.fill_(1)
    table = np.arange(1, 1 + 2 * MAX_BLOCKS, dtype=np.int32).reshape(2, MAX_BLOCKS)
    shapes = StepShape.mixed(4, 2), StepShape.mixed(8, 4)
    platform.copies = 0
    buffers.fill_rows(
        np.array([3, 1]), np.array([9, 5]), [table], np.arange(4), np.array([3, 1]),
        np.array([0, 0]), padded=shapes if together else None,
    )  # fmt: skip
    if not together:
        buffers.fill_padding(*shapes)
    assert platform.copies == (2 if together else 11)
    assert buffers.query_start_loc.device[:5].tolist() == [0, 3, 4, 4, 4]
    assert buffers.seq_lens.device[:4].tolist() == [9, 5, 0, 0]
    assert buffers.input_ids.device[:8].tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert buffers.positions.device[:8].tolist() == [6, 7, 8, 4, 0, 0, 0, 0]
    assert buffers.slots[:, :4].all()
    assert not buffers.slots[:, 4:8].any()
    assert buffers.block_tables[0, :2].tolist() == table.tolist()
    assert not buffers.block_tables[0, 2:4].any()

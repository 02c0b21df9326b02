"""What a step's tensors hold, against a loop over its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.buffers import EDITS, Sampled, StepBuffers
from reprise.sampling_params import SamplingParams
from reprise.step import ScheduledRequest, ScheduledStep

BLOCK, MAX_BLOCKS, MAX_REQUESTS, MAX_TOKENS = 4, 6, 5, 40
PARAMS = SamplingParams()


SHARED = st.sampled_from([None, False])
"""Whether the device reads the host's side; False makes a CPU copy as an accelerator must."""
LENGTHS = st.integers(1, 12)
ROWS = st.lists(st.integers(0, MAX_REQUESTS - 1), min_size=1, unique=True)
EVENTS = st.lists(
    st.sampled_from(["stay", "stay", "stay", "preempt", "replace"]), max_size=MAX_REQUESTS
)


def new_request(number: int, length: int) -> Request:
    return Request(f"{number}", [7 * number + i for i in range(length)], PARAMS)


@dataclass
class World:
    requests: list[Request] = field(default_factory=list)
    """They grow, are preempted, end, and come again under the same id."""
    next_block: int = 1

    def blocks(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def schedule(self, request: Request, start: int, count: int, pending: bool) -> ScheduledRequest:
        missing = -(-(start + count) // BLOCK) - len(request.block_ids)
        request.block_ids.extend(self.blocks(max(missing, 0)))
        samples = start + count >= len(request.token_ids)
        return ScheduledRequest(request, start, count, request.block_ids, samples, pending)


def step_of(scheduled: list[ScheduledRequest], continues: bool = False) -> ScheduledStep:
    tokens = sum(each.num_tokens for each in scheduled)
    return ScheduledStep(0, scheduled, 0, tokens, [], continues=continues)


def check(
    buffers: StepBuffers, scheduled: list[ScheduledRequest], unknown: dict[Request, int]
) -> None:
    """``unknown``: tokens that the step before sampled and the host has not seen."""
    input_ids, positions, slots, starts, lengths = [], [], [], [0], []
    for each in scheduled:
        token_ids = each.request.token_ids
        for position in range(each.start, each.start + each.num_tokens):
            known = position < len(token_ids)
            input_ids.append(token_ids[position] if known else unknown[each.request])
            positions.append(position)
            slots.append(each.block_ids[position // BLOCK] * BLOCK + position % BLOCK)
        starts.append(len(positions))
        lengths.append(each.start + each.num_tokens)
    tokens = len(positions)
    batch = buffers.batch(tokens, len(scheduled), 0)
    assert buffers.input_ids.device[:tokens].tolist() == input_ids
    assert buffers.positions.device[:tokens].tolist() == positions
    assert batch.tables[0].slots.tolist() == slots
    assert batch.query_start_loc.tolist() == starts
    assert batch.seq_lens.tolist() == lengths
    blocks = batch.tables[0].blocks.tolist()
    for each, table, length in zip(scheduled, blocks, lengths, strict=True):
        used = -(-length // BLOCK)
        assert table[:used] == each.block_ids[:used]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_steps(platform: Platform, data: st.DataObject) -> None:
    """Prompts, decodes one step ahead or not, requests that come and go, the same rows again."""
    shared = data.draw(SHARED)
    buffers = StepBuffers(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, BLOCK, platform, shared)
    world = World([new_request(number, data.draw(LENGTHS)) for number in range(MAX_REQUESTS)])
    last: Sampled | None = None
    unknown: dict[Request, int] = {}
    before: list[ScheduledRequest] = []
    for _ in range(data.draw(st.integers(1, 20))):
        same = before and data.draw(st.integers(0, 3)) > 0
        chosen = [each.request for each in before]
        if not same:
            for index, event in enumerate(data.draw(EVENTS)):
                request = world.requests[index]
                if event == "preempt":
                    request.num_computed_tokens = 0
                    request.block_ids = []
                elif event == "replace":  # the id comes again
                    world.requests[index] = new_request(index, data.draw(LENGTHS))
            chosen = [world.requests[index] for index in data.draw(ROWS)]
        scheduled = []
        for request in chosen:
            start = request.num_computed_tokens
            if start != len(request.token_ids) and request in unknown:
                request.token_ids.append(unknown.pop(request))
            left = len(request.token_ids) - start
            count = 1 if left == 0 else data.draw(st.integers(1, min(left, 8)))
            scheduled.append(world.schedule(request, start, count, left == 0))
            request.num_computed_tokens = start + count
        continues = all(
            each.num_tokens == 1 and each.samples for each in (*before, *scheduled)
        ) and [(each.request, each.start) for each in scheduled] == [
            (each.request, each.start + 1) for each in before
        ]
        decodes = all(each.num_tokens == 1 for each in scheduled)
        rows = data.draw(st.integers(len(scheduled), MAX_REQUESTS)) if decodes else None
        buffers.fill(step_of(scheduled, continues), last, rows)
        if rows is not None:
            buffers.fill_padding(len(scheduled), len(scheduled), rows, rows)
            check_padding(buffers, len(scheduled), len(scheduled), rows, rows)
        check(buffers, scheduled, unknown)

        for request, token in unknown.items():
            request.token_ids.append(token)
        unknown = {}
        sampling = [each for each in scheduled if each.samples]
        tokens = [data.draw(st.integers(100, 999)) for _ in sampling]
        if sampling:
            last = Sampled([e.request for e in sampling], torch.tensor(tokens).to(platform.device))
        before = scheduled
        late = data.draw(st.booleans())
        for each, token in zip(sampling, tokens, strict=True):
            if len(each.request.token_ids) >= BLOCK * MAX_BLOCKS - 1:
                each.request.num_computed_tokens = 0  # again, rather than out of the table
            elif late:
                unknown[each.request] = token
            else:
                each.request.token_ids.append(token)


def check_padding(
    buffers: StepBuffers, tokens: int, requests: int, to_tokens: int, to_requests: int
) -> None:
    batch = buffers.batch(to_tokens, to_requests, 0)
    more_tokens, more_requests = to_tokens - tokens, to_requests - requests
    assert batch.tables[0].slots[tokens:].tolist() == [0] * more_tokens
    assert buffers.positions.device[tokens:to_tokens].tolist() == [0] * more_tokens
    assert batch.seq_lens[requests:].tolist() == [0] * more_requests
    assert batch.query_start_loc[requests:].tolist() == [tokens] * (1 + more_requests)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=MAX_REQUESTS - 1),
    more_tokens=st.integers(0, 8),
    more_requests=st.integers(0, 1),
    shared=SHARED,
)
def test_padding_is_harmless(
    platform: Platform, lengths: list[int], more_tokens: int, more_requests: int,
    shared: bool | None,
) -> None:  # fmt: skip
    """Rows behind the step write into the null block only, and attend to nothing."""
    buffers = StepBuffers(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, BLOCK, platform, shared)
    world = World()
    earlier = [world.schedule(new_request(i, 8), 0, 8, False) for i in range(MAX_REQUESTS)]
    buffers.fill(step_of(earlier))  # what lies behind the next, smaller step
    scheduled = [
        world.schedule(new_request(9 + i, length), 0, length, False)
        for i, length in enumerate(lengths)
    ]
    buffers.fill(step_of(scheduled))
    tokens, requests = sum(lengths), len(lengths)
    to_tokens, to_requests = tokens + more_tokens, requests + more_requests
    buffers.fill_padding(tokens, requests, to_tokens, to_requests)
    check(buffers, scheduled, {})
    check_padding(buffers, tokens, requests, to_tokens, to_requests)
    assert buffers.input_ids.device[tokens:to_tokens].tolist() == [0] * more_tokens


@pytest.mark.parametrize("forget", [False, True])
def test_tables_that_were_overwritten_are_sent_again(platform: Platform, forget: bool) -> None:
    buffers = StepBuffers(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, BLOCK, platform, shared=False)
    world = World()
    scheduled = [world.schedule(new_request(i, 8), 0, 8, False) for i in range(3)]
    buffers.fill(step_of(scheduled))
    if forget:
        buffers.block_tables.fill_(-1)
        buffers.forget_tables()
    addresses = {name: each.data_ptr() for name, each in buffers.views(8, 3).items()}
    for order in (scheduled[::-1], scheduled):
        buffers.fill(step_of(order))
        check(buffers, order, {})
    assert {name: each.data_ptr() for name, each in buffers.views(8, 3).items()} == addresses
    assert all(isinstance(each, torch.Tensor) for each in buffers.views(8, 3).values())


def test_more_new_blocks_than_travel_with_a_step(platform: Platform) -> None:
    count = EDITS // 2 + 1
    buffers = StepBuffers(2, 2, count, BLOCK, platform, shared=False)
    world = World()
    scheduled = [
        world.schedule(new_request(i, count * BLOCK), count * BLOCK - 1, 1, False) for i in (0, 1)
    ]
    buffers.fill(step_of(scheduled))
    check(buffers, scheduled, {})

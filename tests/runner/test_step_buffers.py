"""What a step's tensors hold, against a loop over its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from reprise.platforms import Platform
from reprise.request import Request
from reprise.runner.buffers import StepBuffers
from reprise.sampling_params import SamplingParams
from reprise.step import ScheduledRequest

BLOCK, MAX_BLOCKS, MAX_REQUESTS, MAX_TOKENS = 4, 6, 5, 40
PARAMS = SamplingParams()


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


def check(buffers: StepBuffers, scheduled: list[ScheduledRequest], result: tuple[int, int]) -> None:
    input_ids, positions, slots, starts, lengths = [], [], [], [0], []
    for each in scheduled:
        for position in range(each.start, each.start + each.num_tokens):
            known = position < len(each.request.token_ids)
            input_ids.append(each.request.token_ids[position] if known else None)
            positions.append(position)
            slots.append(each.block_ids[position // BLOCK] * BLOCK + position % BLOCK)
        starts.append(len(positions))
        lengths.append(each.start + each.num_tokens)
    tokens, requests = result
    assert result == (len(positions), len(scheduled))
    metadata = buffers.metadata(tokens, requests, 0)
    found = buffers.input_ids.device[:tokens].tolist()
    assert [a for a, b in zip(found, input_ids, strict=True) if b is not None] == [
        b for b in input_ids if b is not None
    ]
    assert buffers.positions.device[:tokens].tolist() == positions
    assert metadata.slot_mapping.tolist() == slots
    assert metadata.query_start_loc.tolist() == starts
    assert metadata.seq_lens.tolist() == lengths
    for each, table, length in zip(scheduled, metadata.block_tables.tolist(), lengths, strict=True):
        used = -(-length // BLOCK)
        assert table[:used] == each.block_ids[:used]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_steps(platform: Platform, data: st.DataObject) -> None:
    buffers = StepBuffers(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, BLOCK, platform)
    world = World([new_request(number, data.draw(LENGTHS)) for number in range(MAX_REQUESTS)])
    for _ in range(data.draw(st.integers(1, 12))):
        for index, event in enumerate(data.draw(EVENTS)):
            request = world.requests[index]
            if event == "preempt":
                request.num_preemptions += 1
                request.num_computed_tokens = 0
                request.block_ids = []
            elif event == "replace":  # the id comes again
                world.requests[index] = new_request(index, data.draw(LENGTHS))
        chosen = [world.requests[index] for index in data.draw(ROWS)]
        scheduled = []
        for request in chosen:
            start = request.num_computed_tokens
            left = len(request.token_ids) - start
            pending = left == 0
            count = 1 if pending else data.draw(st.integers(1, min(left, 8)))
            scheduled.append(world.schedule(request, start, count, pending))
            request.num_computed_tokens = start + count
        check(buffers, scheduled, buffers.fill(scheduled))
        for each in scheduled:
            request = each.request
            full = len(request.token_ids) >= BLOCK * MAX_BLOCKS - 1
            if each.samples and full:
                request.num_computed_tokens = 0  # start again rather than grow out of the table
            elif each.samples:
                request.token_ids.append(100 + len(request.token_ids))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=MAX_REQUESTS - 1),
    more_tokens=st.integers(0, 8),
    more_requests=st.integers(0, 1),
)
def test_padding_is_harmless(
    platform: Platform, lengths: list[int], more_tokens: int, more_requests: int
) -> None:
    """Rows behind the step write into the null block only, and attend to nothing."""
    buffers = StepBuffers(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, BLOCK, platform)
    world = World()
    earlier = [world.schedule(new_request(i, 8), 0, 8, False) for i in range(MAX_REQUESTS)]
    buffers.fill(earlier)  # what lies behind the next, smaller step
    scheduled = [
        world.schedule(new_request(9 + i, length), 0, length, False)
        for i, length in enumerate(lengths)
    ]
    tokens, requests = buffers.fill(scheduled)
    to_tokens, to_requests = tokens + more_tokens, requests + more_requests
    buffers.fill_padding(tokens, requests, to_tokens, to_requests)
    check(buffers, scheduled, (tokens, requests))
    metadata = buffers.metadata(to_tokens, to_requests, 0)
    assert metadata.slot_mapping[tokens:].tolist() == [0] * more_tokens
    assert buffers.positions.device[tokens:to_tokens].tolist() == [0] * more_tokens
    assert buffers.input_ids.device[tokens:to_tokens].tolist() == [0] * more_tokens
    assert metadata.seq_lens[requests:].tolist() == [0] * more_requests
    assert metadata.query_start_loc[requests:].tolist() == [tokens] * (1 + more_requests)


@pytest.mark.parametrize("forget", [False, True])
def test_tables_that_were_overwritten_are_sent_again(platform: Platform, forget: bool) -> None:
    buffers = StepBuffers(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS, BLOCK, platform)
    world = World()
    scheduled = [world.schedule(new_request(i, 8), 0, 8, False) for i in range(3)]
    buffers.fill(scheduled)
    if forget:
        buffers.block_tables.device.fill_(-1)
        buffers.forget_tables()
    addresses = {name: each.data_ptr() for name, each in buffers.views(8, 3).items()}
    check(buffers, scheduled[::-1], buffers.fill(scheduled[::-1]))
    check(buffers, scheduled, buffers.fill(scheduled))
    assert {name: each.data_ptr() for name, each in buffers.views(8, 3).items()} == addresses
    assert all(isinstance(each, torch.Tensor) for each in buffers.views(8, 3).values())

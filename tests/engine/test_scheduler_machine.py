"""Random lives of the scheduler against a simulated device that knows what each slot holds.

The device knows of a step what its pickled copy says, and runs steps as late as it may: when their
results are asked for. Slots hold the salt, the weights' version and the whole token prefix that
they were computed from, so that wrong sharing, stale blocks and blocks freed too early all show as
a slot that holds somebody else's prefix. Where tokens are drafted, some drafts are right.
"""

from __future__ import annotations

import dataclasses
import pickle
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reprise.cache import KEPT, NULL_BLOCK, CacheLayout, CacheManager, State, Window, one_table
from reprise.cache.layout import PoolLayout, TableLayout
from reprise.engine.scheduler import Scheduler
from reprise.errors import CapacityError
from reprise.request import Request, RequestStatus
from reprise.sampling_params import SamplingParams
from reprise.step import NULL_ROW, Admission, Step

EOS, STOP = 4, 3
MODEL_LEN = 40
TEXT = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0]
PROMPTS = st.one_of(
    st.integers(1, len(TEXT)).map(lambda length: TEXT[:length]),
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
)
"""Mostly prefixes of one text."""
SIZES = st.sampled_from([1, 2, 4])
WINDOWS = st.integers(1, 9).map(Window)


def several(*tables: tuple[Any, int, int], blocks: list[int]) -> CacheLayout:
    return CacheLayout(
        tuple(TableLayout(*each) for each in tables), tuple(PoolLayout(1, n) for n in blocks)
    )


LAYOUTS = st.one_of(
    st.builds(one_table, st.integers(4, 14), st.integers(1, 4)),
    st.builds(one_table, st.integers(4, 14), SIZES, WINDOWS),
    st.builds(
        lambda size, window, blocks: several((KEPT, size, 0), (window, size, 0), blocks=[blocks]),
        SIZES, WINDOWS, st.integers(8, 24),
    ),
    st.builds(
        lambda size, other, window, kept, blocks: several(
            (KEPT, size, 0), (window, other, 1), blocks=[kept, blocks]
        ),
        SIZES, SIZES, WINDOWS, st.integers(4, 14), st.integers(4, 20),
    ),
    st.builds(
        lambda size, every, apart, kept, slots: several(
            (KEPT, size, 0), (State(every * apart), every, 1), blocks=[kept, slots]
        ),
        SIZES, SIZES, SIZES, st.integers(4, 14), st.integers(2, 9),
    ),
    st.builds(
        lambda size, window, every, apart, blocks, slots: several(
            (window, size, 0), (State(every * apart), every, 1), blocks=[blocks, slots]
        ),
        SIZES, WINDOWS, SIZES, SIZES, st.integers(4, 20), st.integers(2, 9),
    ),
)  # fmt: skip
"""Caches that are kept, windows, both from one pool or from two, and states beside either."""
Content = tuple[bytes, int, tuple[int, ...]]


def next_token(prefix: Sequence[int]) -> int:
    """The model. Its favourite tokens are those of the prompts, so that prefixes collide."""
    choice = zlib.crc32(bytes(prefix)) % 40
    return {0: EOS, 1: STOP, 2: 2}.get(choice, choice % 2)


def run_alone(request: Request, longest: int) -> tuple[list[int], str]:
    """Output and finish reason without any scheduler."""
    params, tokens, output = request.params, list(request.prompt_token_ids), list[int]()
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
    if params.max_tokens is not None:
        longest = min(longest, len(tokens) + params.max_tokens)
    while True:
        tokens.append(next_token(tokens))
        output.append(tokens[-1])
        if tokens[-1] in stops and len(output) >= params.min_tokens:
            return output, "stop"
        if len(tokens) >= longest:
            return output, "length"


@dataclass
class Row:
    """The device's state of one request."""

    version: int
    salt: bytes
    admission: Admission
    tokens: list[int]
    """Those that are computed."""
    newest: int | None = None
    accepted: int = 0
    """Of the tokens beside its states, how many count."""

    def content(self, tokens: Sequence[int], position: int) -> Content:
        return self.salt, self.version, tuple(tokens[: position + 1])


@dataclass
class Part:
    """One request's share of a step, as it was when the step was handed to the device."""

    row: int
    tables: list[list[int]]
    written: set[tuple[int, int]]
    """Blocks that the step may write, with their pools."""
    begin: int
    """Where it begins at least, as far as is known when it is launched."""
    end: int
    admission: Admission


@dataclass
class Launch:
    original: Step
    step: Step
    """What another process would get."""
    version: int
    salts: dict[int, bytes]
    """Of the admitted rows."""
    requests: list[Request]
    parts: list[Part]


@dataclass
class Device:
    layout: CacheLayout
    max_rows: int
    drafts: int
    tables: dict[int, list[list[int]]] = field(default_factory=dict)
    admissions: dict[int, Admission] = field(default_factory=dict)
    """Who has which row, once the steps that were launched have run."""
    rows: dict[int, Row] = field(default_factory=dict)
    slots: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    """By table, block and place in it."""
    queue: list[Launch] = field(default_factory=list)

    def launch(self, step: Step, requests: list[Request], version: int) -> None:
        sent: Step = pickle.loads(pickle.dumps(step))
        by_row = {each.row: each for each in requests}
        for each in sent.admitted:
            assert NULL_ROW < each.row <= self.max_rows
            self.tables[each.row] = [[] for _ in self.layout.tables]
            self.admissions[each.row] = each
        for number, edits in enumerate(sent.edits):
            for edit in edits:
                table = self.tables[edit.row][number]
                if edit.begin < len(table):
                    assert not any(edit.blocks), "each entry is sent once, or given back"
                table[edit.begin : edit.begin + len(edit.blocks)] = edit.blocks
        parts = []
        for number, (row, request) in enumerate(zip(sent.rows, requests, strict=True)):
            total = sent.counts[number] + sent.drafts[number]
            end = min(request.num_computed_tokens, request.max_total_tokens - 1)
            start = request.num_computed_tokens - total
            if number < sent.num_decodes:  # as far as is certain
                start = len(request.token_ids) + request.num_pending - 2
            tables = [list(each) for each in self.tables[row]]
            part = Part(row, tables, set(), start, end, self.admissions[row])
            for each, table, own in zip(self.layout.tables, tables, request.tables, strict=True):
                needed = each.lifetime.needed(start, end, each.block_size)
                for at in needed:
                    assert table[at] == own[at] != NULL_BLOCK
                if each.lifetime.rewritten:
                    continue
                written = range(start // each.block_size, needed.stop)
                part.written |= {(each.pool, table[at]) for at in written}
            parts.append(part)
        salts = {each.row: by_row[each.row].cache_salt for each in sent.admitted}
        launch = Launch(step, sent, version, salts, requests, parts)
        for earlier in self.queue:
            self._check_disjoint(earlier, launch)
        self.queue.append(launch)

    def _used(self, part: Part) -> set[tuple[int, int]]:
        """Blocks that a step under way may read or write, as far as the device has come."""
        row, begin = self.rows.get(part.row), part.begin
        if row is not None and row.admission is part.admission:
            begin = max(begin, len(row.tokens))
        return {
            (each.pool, table[at])
            for each, table in zip(self.layout.tables, part.tables, strict=True)
            if not each.lifetime.rewritten
            for at in each.lifetime.needed(begin, part.end, each.block_size)
        }

    def _check_disjoint(self, earlier: Launch, later: Launch) -> None:
        """A later step writes no block that an earlier one uses for another request."""
        for ours, mine in zip(later.requests, later.parts, strict=True):
            for theirs, other in zip(earlier.requests, earlier.parts, strict=True):
                assert ours is theirs or not mine.written & self._used(other)

    def run_oldest(self) -> tuple[Step, list[list[int]]]:
        launch = self.queue.pop(0)
        step = launch.step
        pools = [each.pool for each in self.layout.tables]
        copied = [self.slots.get((pools[each.table], each.source, 0)) for each in step.copies]
        for each, content in zip(step.copies, copied, strict=True):
            self.slots[pools[each.table], each.target, 0] = content
        for each in step.released:
            del self.rows[each]
        for each in step.admitted:
            assert each.row not in self.rows
            tokens = list(each.token_ids[: each.start])
            salt = launch.salts[each.row]
            self.rows[each.row] = Row(launch.version, salt, each, tokens, accepted=each.replay)
        for part in launch.parts:
            # Kernels may read what is older than the step before others of it have written.
            row = self.rows[part.row]
            self._check(row, part.tables, row.tokens, len(row.tokens), len(row.tokens))
        work = []
        for number, part in enumerate(launch.parts):
            row, count = self.rows[part.row], step.counts[number]
            start = len(row.tokens)
            if number < step.num_decodes:
                assert row.newest is not None
                inputs = [row.newest]
                for _ in range(step.drafts[number]):
                    right = zlib.crc32(bytes([*row.tokens, *inputs, 7])) % 3 > 0
                    draft = next_token([*row.tokens, *inputs])
                    inputs.append(draft if right else (draft + 1) % 5)
            else:
                inputs = list(row.admission.token_ids[start : start + count])
                assert len(inputs) == count
            tokens = [*row.tokens, *inputs]
            end = min(len(tokens), row.admission.limit)
            work.append((row, tokens, start, end, part.tables))
            verifies = number < step.num_decodes and self.drafts > 0
            for table, layout in enumerate(self.layout.tables):
                if layout.lifetime.rewritten:
                    slot = self._slot(table, part.tables[table], 0)
                    self.slots[slot] = self._state(row, slot, tokens, start, end, verifies)
                    continue
                for at in range(start, end):
                    slot = self._slot(table, part.tables[table], at)
                    self.slots[slot] = row.content(tokens, at)
        results: list[list[int]] = []
        for number, (row, tokens, start, end, tables) in enumerate(work):
            # After all writes, which must not overlap.
            self._check(row, tables, tokens, start, end)
            if number >= step.num_decodes:
                row.tokens = tokens
                drawn = [next_token(tokens)] if step.samples[number] else []
            else:
                drawn = [next_token(tokens[: start + 1])]
                while start + len(drawn) < len(tokens) and drawn[-1] == tokens[start + len(drawn)]:
                    drawn.append(next_token(tokens[: start + len(drawn) + 1]))
                row.tokens = tokens[: start + len(drawn)][: row.admission.limit]
            row.accepted = len(drawn) if number < step.num_decodes and self.drafts else 0
            if drawn:
                row.newest = drawn[-1]
            results.append(drawn)
        return launch.original, results

    def _check(
        self, row: Row, tables: list[list[int]], tokens: list[int], start: int, end: int
    ) -> None:
        """What a request reads of its tokens up to ``end``, of which those from ``start`` on are
        new, is what was computed of them."""
        for index, layout in enumerate(self.layout.tables):
            window = getattr(layout.lifetime, "size", MODEL_LEN)
            for at in range(max(0, start - window + 1), end):
                if not layout.lifetime.rewritten:
                    slot = self._slot(index, tables[index], at)
                    assert self.slots.get(slot) == row.content(tokens, at)

    def _state(
        self, row: Row, slot: tuple[int, int, int], tokens: list[int], start: int, end: int,
        verifies: bool,
    ) -> Any:  # fmt: skip
        """What a step leaves in a slot: what the state is of, and the tokens beside it."""
        now: tuple[int, ...] = ()
        if start:
            salt, version, now, beside = self.slots[slot]
            assert (salt, version) == (row.salt, row.version)
            # Of tokens beyond a request's end nothing is kept.
            now = (*now, *beside[: row.accepted])
        assert now == tuple(tokens[:start])
        new = tuple(tokens[start:end])
        return row.salt, row.version, *((now, new) if verifies else ((*now, *new), ()))

    def _slot(self, number: int, table: list[int], position: int) -> tuple[int, int, int]:
        layout = self.layout.tables[number]
        size = MODEL_LEN if layout.lifetime.rewritten else layout.block_size
        block = table[position // size]
        assert block != NULL_BLOCK
        return layout.pool, block, 0 if layout.lifetime.rewritten else position % size


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        layout=LAYOUTS,
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(0, 8),
        prefix_caching=st.sampled_from([True, True, False]),
        reserve_blocks=st.integers(0, 1),
        depth=st.integers(2, 3),
        drafts=st.sampled_from([0, 0, 1, 3]),
        blocks_ahead=st.sampled_from([0, 3]),
    )
    def start(
        self,
        layout: CacheLayout,
        max_num_seqs: int,
        budget: int,
        prefix_caching: bool,
        reserve_blocks: int,
        depth: int,
        drafts: int,
        blocks_ahead: int,
    ) -> None:
        layout = dataclasses.replace(
            layout,
            tables=tuple(
                dataclasses.replace(each, ahead=depth * (1 + drafts)) for each in layout.tables
            ),
        )
        while layout.capacity < 1:
            layout = layout.sized([2 * each.num_blocks for each in layout.pools])
        self.cache = CacheManager(layout, prefix_caching)
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs,
            max_num_seqs * (1 + drafts) + budget,
            max_model_len=MODEL_LEN,
            reserve_blocks=reserve_blocks,
            num_drafts=drafts,
            blocks_ahead=blocks_ahead,
        )
        self.device = Device(layout, max_num_seqs, drafts)
        self.requests: list[Request] = []
        self.cut_short: set[Request] = set()
        self.version = 0
        self.depth = depth
        """Most steps that are under way together."""
        self.num_steps = 0
        self.row_of: dict[Request, int] = {}
        """Of those that run."""

    @property
    def live(self) -> list[Request]:
        return [request for request in self.requests if not request.is_finished]

    # ------------------------------------------------------------------ rules

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=5),
        priority=st.integers(-1, 1),
        max_tokens=st.one_of(st.none(), st.integers(1, 25)),
        min_tokens=st.integers(0, 6),
        ignore_eos=st.booleans(),
        stops=st.sampled_from([None, [STOP], [STOP, EOS]]),
        salt=st.sampled_from([b"", b"", b"", b"salt"]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
    )
    def add(
        self,
        prompts: list[list[int]],
        priority: int,
        max_tokens: int | None,
        min_tokens: int,
        ignore_eos: bool,
        stops: list[int] | None,
        salt: bytes,
        prompt_logprobs: int | None,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens or min_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=stops,
            prompt_logprobs=prompt_logprobs,
        )
        for prompt in prompts:
            # Ids are used again once their request has finished.
            taken = {request.request_id for request in self.live}
            name = next(str(i) for i in range(len(taken) + 1) if str(i) not in taken)
            request = Request(
                name, prompt, params, priority, eos_token_ids=frozenset([EOS]), cache_salt=salt
            )
            try:
                self.scheduler.add(request)
            except CapacityError:
                assert len(prompt) > self.cache.capacity
            else:
                self.requests.append(request)

    @precondition(lambda self: self.scheduler.num_outstanding < self.depth)
    @rule()
    def schedule(self) -> None:
        self._schedule()

    @precondition(lambda self: self.scheduler.num_outstanding)
    @rule()
    def update(self) -> None:
        self._update()

    @precondition(lambda self: self.scheduler.num_outstanding)
    @rule(which=st.integers(0, 7))
    def update_without_numbers(self, which: int) -> None:
        """The logits of one request are NaN."""
        self._update(which)

    @rule(count=st.integers(1, 15))
    def run_in_lockstep(self, count: int) -> None:
        for _ in range(count):
            while self.scheduler.num_outstanding:
                self._update()
            step = self._schedule()
            assert (step is not None) == bool(self.live)
            if step is None:
                return
            most_urgent = self._running()[0]
            assert most_urgent in self.scheduler.requests_of(step)
            self._update()

    @rule(count=st.integers(1, 15))
    def run_one_ahead(self, count: int) -> None:
        for _ in range(count):
            if self.scheduler.num_outstanding < self.depth:
                self._schedule()
            if self.scheduler.num_outstanding:
                self._update()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        assert self.scheduler.abort(request.request_id) is request
        assert request.finish_reason == "abort"
        assert self.scheduler.abort(request.request_id) is None
        self.cut_short.add(request)

    @precondition(lambda self: any(request.output_token_ids for request in self.live))
    @rule(data=st.data())
    def find_stop_string(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([r for r in self.live if r.output_token_ids]))
        self.scheduler.finish(request, "stop", "a stop string")
        assert (request.finish_reason, request.stop_reason) == ("stop", "a stop string")
        self.cut_short.add(request)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()
        self.version += 1

    @rule()
    def recompute(self) -> None:
        running = len(self._running())
        assert self.scheduler.recompute() == running
        assert not self._running()
        self.version += 1

    @rule()
    def drop_steps(self) -> None:
        """A step failed; what those under way did to the cache and the rows is anyone's guess."""
        running = len(self._running())
        while self.device.queue and len(self.device.queue) > self.num_steps % 2:
            self.device.run_oldest()
        self.device.queue.clear()
        self.device.rows.clear()
        assert self.scheduler.drop_steps() == running
        assert self.scheduler.num_outstanding == 0
        self.row_of = {}
        self.device.tables.clear()
        self.version += 1

    # ------------------------------------------------------------------ the loop

    def _running(self) -> list[Request]:
        running = [r for r in self.live if r.status is RequestStatus.RUNNING]
        return sorted(running, key=lambda request: request.urgency)

    def _schedule(self) -> Step | None:
        running = set(self._running())
        decodable = {r for r in running if self._can_decode(r)}
        step = self.scheduler.schedule()
        if step is None:
            return None
        assert step.index == self.num_steps
        self.num_steps += 1
        requests = list(self.scheduler.requests_of(step))
        width = self.scheduler.num_drafts + 1
        assert requests
        assert len(set(requests)) == len(requests) <= self.scheduler.max_num_seqs
        assert step.num_tokens == sum(step.counts) + sum(step.drafts)
        assert step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert all(count > 0 for count in step.counts)
        assert list(step.counts[: step.num_decodes]) == [1] * step.num_decodes
        drafts = [width - 1] * step.num_decodes + [0] * (len(requests) - step.num_decodes)
        assert list(step.drafts) == drafts
        totals = {a + b for a, b in zip(step.counts, step.drafts, strict=True)}
        decodes = step.num_decodes == len(requests) or totals == {1}
        assert step.shape.phase == ("decode" if decodes else "mixed")
        self._check_rows(step, requests)
        if decodable - set(requests):
            assert set(requests) <= running, "admitted while a running request lacks a block"
        self.device.launch(step, requests, self.version)
        return step

    def _check_rows(self, step: Step, requests: list[Request]) -> None:
        """A request keeps its row from admission to its end."""
        for row in step.released:
            owner = next(each for each, its in self.row_of.items() if its == row)
            del self.row_of[owner]
        admitted = {each.row: each for each in step.admitted}
        for row, request in zip(step.rows, requests, strict=True):
            if row in admitted:
                assert request not in self.row_of
                assert row not in self.row_of.values()
                assert admitted[row].token_ids == request.token_ids
                self.row_of[request] = row
            assert self.row_of[request] == row == request.row

    @staticmethod
    def _can_decode(request: Request) -> bool:
        certain = request.num_tokens + request.num_pending
        computed = request.num_computed_tokens >= request.num_known_tokens
        return computed and certain < request.max_total_tokens

    def _update(self, failing: int | None = None) -> None:
        step, results = self.device.run_oldest()
        requests = list(self.scheduler.requests_of(step))
        finished = {request for request in self.requests if request.is_finished}
        before = {r: list(r.output_token_ids) for r in self.requests}
        drawn = [number for number, tokens in enumerate(results) if tokens]
        failed = [] if failing is None else drawn[failing : failing + 1]
        for number in failed:
            results[number] = []
        blocks = [list(requests[number].tables) for number in failed]
        updated = self.scheduler.update(step, results, failed)
        for number, tables in zip(failed, blocks, strict=True):
            request = requests[number]
            if request not in finished:
                assert request.finish_reason == "error"
                assert request in updated
                updated.remove(request)
                self.cut_short.add(request)
                for layout, held in zip(self.cache.layout.tables, tables, strict=False):
                    pool = self.cache.pools[layout.pool]
                    assert not any(block in pool._index for block in held)
        for request, tokens in zip(requests, results, strict=True):
            dropped = request in finished or not tokens
            assert (request in updated) == (not dropped)
            added = request.output_token_ids[len(before[request]) :]
            assert request.output_token_ids == before[request] + added
            assert added == tokens[: len(added)]
            if dropped:
                assert not added
            elif not request.is_finished:
                assert added == tokens

    # ------------------------------------------------------------------ invariants

    @invariant()
    def blocks_have_exactly_their_owners(self) -> None:
        layout = self.cache.layout
        for number, pool in enumerate(self.cache.pools):
            owners = Counter(
                block
                for request in self.requests
                for each, blocks, left in zip(
                    layout.tables, request.tables, request.num_left, strict=False
                )
                if each.pool == number
                for block in blocks[left:]
            )
            owners += Counter(
                each.slot
                for request in self.requests
                for each in request.checkpoints
                if each.table.pool is pool
            )
            assert NULL_BLOCK not in owners
            for block in range(pool.num_blocks):
                assert pool.ref_count(block) == owners[block]
            assert pool.num_used == len(owners)
            assert pool.num_free + pool.num_used + 1 == pool.num_blocks
            assert 0 <= pool.num_claimed <= pool.num_free
            if not self.cache.enable_prefix_caching:
                assert set(owners.values()) <= {1}

    @invariant()
    def lifetimes_have_what_their_tables_own(self) -> None:
        used = {name: count for name, (count, _) in self.cache.used_by_lifetime().items()}
        owned = {
            str(table.lifetime): {
                block
                for request in self.requests
                if request.tables
                for block in request.tables[number][request.num_left[number] :]
            }
            for number, table in enumerate(self.cache.layout.tables)
        }
        for request in self.requests:
            for each in request.checkpoints:
                owned[str(each.table.lifetime)].add(each.slot)
        assert used == {name: len(blocks) for name, blocks in owned.items()}

    @invariant()
    def free_blocks_form_one_ring(self) -> None:
        for pool in self.cache.pools:
            ring = list[int]()
            block = pool._next[NULL_BLOCK]
            while block != NULL_BLOCK:
                assert pool._previous[pool._next[block]] == block
                assert pool.ref_count(block) == 0
                ring.append(block)
                block = pool._next[block]
            assert len(ring) == len(set(ring)) == pool.num_free

    @invariant()
    def idle_requests_own_nothing(self) -> None:
        for request in self.requests:
            if request.status is not RequestStatus.RUNNING and not request.num_in_flight:
                assert not request.tables
            assert request.num_in_flight >= 0
            assert request.is_finished or request.num_pending >= 0
            if request.skip_prefix_cache:
                assert request.num_cached_tokens == 0

    @invariant()
    def stats_agree(self) -> None:
        stats = self.scheduler.stats()
        assert stats.num_running == len(self._running()) <= self.scheduler.max_num_seqs
        assert stats.num_running + stats.num_waiting == len(self.live)
        waiting = [each for each in self.live if each.status is not RequestStatus.RUNNING]
        tokens = sum(each.num_prompt_tokens for each in waiting)
        assert self.scheduler.num_waiting_tokens == tokens
        reasons = Counter(r.finish_reason for r in self.requests if r.is_finished)
        assert {k: v for k, v in stats.total_finished.items() if v} == dict(reasons)
        assert stats.total_preemptions == sum(r.num_preemptions for r in self.requests)
        generated = sum(r.num_output_tokens for r in self.requests)
        assert stats.total_generated_tokens == generated

    @invariant()
    def outputs_are_those_of_a_run_alone(self) -> None:
        longest = min(MODEL_LEN, self.cache.capacity + 1)
        for request in self.requests:
            output, reason = run_alone(request, longest)
            if request.is_finished and request not in self.cut_short:
                assert request.output_token_ids == output
                assert request.finish_reason == reason
            else:
                assert request.output_token_ids == output[: request.num_output_tokens]
            assert request.token_ids == request.prompt_token_ids + request.output_token_ids

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        tokens = sum(request.max_total_tokens for request in self.live)
        bound = 4 * tokens * (len(self.live) + 1) + 10
        depth = 1 + self.num_steps % self.depth
        while self.scheduler.has_work:
            bound -= 1
            assert bound > 0, "no progress"
            stuck = self.scheduler.num_outstanding >= depth or self._schedule() is None
            if stuck:
                assert self.scheduler.num_outstanding, "nothing runs and nothing can be scheduled"
                self._update()
        assert self.cache.num_used == 0
        assert all(request.is_finished for request in self.requests)
        self.outputs_are_those_of_a_run_alone()
        self.blocks_have_exactly_their_owners()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

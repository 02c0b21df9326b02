from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from reprise.cache import CacheLayout, CacheManager, State, Window, one_table
from reprise.cache.layout import PoolLayout, TableLayout
from reprise.engine.scheduler import Scheduler
from reprise.errors import CapacityError, ConfigError, RequestError
from reprise.request import Request, RequestStatus
from reprise.sampling_params import SamplingParams
from reprise.step import NULL_ROW, Step

EOS = 9


def make(
    num_blocks: int = 100,
    block_size: int = 4,
    seqs: int = 8,
    budget: int = 32,
    model_len: int = 100,
    prefix_caching: bool = True,
    drafts: int = 0,
) -> Scheduler:
    cache = CacheManager(one_table(num_blocks, block_size), prefix_caching)
    return Scheduler(cache, seqs, budget, model_len, reserve_blocks=0, num_drafts=drafts)


def request(name: str, prompt: int | list[int] = 4, priority: int = 0, **params: Any) -> Request:
    tokens = [100 + ord(name[0])] * prompt if isinstance(prompt, int) else prompt
    return Request(name, tokens, SamplingParams(**params), priority, eos_token_ids=frozenset([EOS]))


def added(scheduler: Scheduler, *requests: Request) -> list[Request]:
    for each in requests:
        scheduler.add(each)
    return list(requests)


@dataclass
class Scheduled:
    """A step, in terms of requests."""

    step: Step
    requests: list[Request]
    starts: list[int]
    released: list[str]


_owners: dict[int, str] = {}
"""By row: who had it last."""


def scheduled(scheduler: Scheduler) -> Scheduled:
    step = scheduler.schedule()
    assert step is not None
    released = [_owners[row] for row in step.released]
    _owners.update({each.row: each.request_id for each in step.admitted})
    requests = list(scheduler.requests_of(step))
    assert [each.row for each in requests] == list(step.rows)
    starts = [
        each.num_computed_tokens - count for each, count in zip(requests, step.counts, strict=True)
    ]
    return Scheduled(step, requests, starts, released)


def run(
    scheduler: Scheduler, one: Scheduled, token: Callable[[Request], int] | int = 1
) -> list[Request]:
    pick = token if callable(token) else lambda _: token
    results = [
        [pick(each)] if samples else []
        for each, samples in zip(one.requests, one.step.samples, strict=True)
    ]
    return scheduler.update(one.step, results)


def parts(one: Scheduled) -> list[tuple[str, int, int, bool]]:
    names = [each.request_id for each in one.requests]
    return list(zip(names, one.starts, one.step.counts, one.step.samples, strict=True))


# ---------------------------------------------------------------------- steps


def test_prefill_then_decode() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", 5, max_tokens=2))
    step = scheduled(scheduler)
    assert (step.step.shape.phase, step.step.num_tokens, step.step.num_decodes) == ("mixed", 5, 0)
    assert parts(step) == [("a", 0, 5, True)]
    assert run(scheduler, step, 7) == [a]
    step = scheduled(scheduler)
    assert (step.step.shape.phase, step.step.index) == ("decode", 1)
    assert parts(step) == [("a", 5, 1, True)]
    assert step.step.num_decodes == 1
    run(scheduler, step, 8)
    assert (a.output_token_ids, a.finish_reason, a.stop_reason) == ([7, 8], "length", None)
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_prompt_of_one_token_is_a_decode_step() -> None:
    scheduler = make()
    added(scheduler, request("a", 1), request("b", 1))
    assert scheduled(scheduler).step.shape.phase == "decode"


def test_long_prompt_is_chunked_and_never_stalls_decodes() -> None:
    scheduler = make(budget=8)
    added(scheduler, request("a"), request("b", 18))
    first = scheduled(scheduler)
    assert parts(first) == [("a", 0, 4, True), ("b", 0, 4, False)]
    run(scheduler, first)
    for start, count, samples in [(4, 7, False), (11, 7, True)]:
        step = scheduled(scheduler)
        assert [part[0] for part in parts(step)] == ["a", "b"]
        assert parts(step)[1] == ("b", start, count, samples)
        assert (step.step.num_tokens, step.step.num_decodes, step.step.shape.phase) == (
            8,
            1,
            "mixed",
        )
        run(scheduler, step)
    assert scheduled(scheduler).step.shape.phase == "decode"


def test_started_prompt_continues_before_a_more_urgent_one_starts() -> None:
    scheduler = make(budget=8)
    added(scheduler, request("a", 12))
    run(scheduler, scheduled(scheduler))
    added(scheduler, request("b", 12, priority=-5))
    assert parts(scheduled(scheduler)) == [("a", 8, 4, True), ("b", 0, 4, False)]


def test_order_of_admission() -> None:
    scheduler = make(seqs=2)
    added(scheduler, request("a", priority=1), request("b"), request("c", priority=-1))
    assert [part[0] for part in parts(scheduled(scheduler))] == ["c", "b"]
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting) == (2, 1)


def test_admission_leaves_the_reserve_to_those_who_run() -> None:
    scheduler = Scheduler(CacheManager(one_table(5, 4), True), 8, 32, 100, reserve_blocks=1)
    added(scheduler, request("a", 12), request("b", 4))
    assert [part[0] for part in parts(scheduled(scheduler))] == ["a"]


def test_prefix_is_computed_once() -> None:
    scheduler = make()
    tokens = list(range(10))
    (a,) = added(scheduler, request("a", tokens, max_tokens=1))
    run(scheduler, scheduled(scheduler))
    (b,) = added(scheduler, request("b", [*tokens, 50]))
    assert parts(scheduled(scheduler)) == [("b", 8, 3, True)]
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)
    stats = scheduler.stats()
    assert (stats.total_prefix_queries, stats.total_prefix_hits) == (21, 8)


def test_generated_tokens_are_shared_too() -> None:
    scheduler = make()
    added(scheduler, request("a", [1, 2, 3], max_tokens=6))
    while scheduler.has_work:
        run(scheduler, scheduled(scheduler), 5)
    added(scheduler, request("b", [1, 2, 3, 5, 5, 5, 5, 5, 6]))
    assert parts(scheduled(scheduler)) == [("b", 8, 1, True)]


def test_prompt_logprobs_skip_the_prefix_cache() -> None:
    scheduler = make()
    for name in "ab":
        added(scheduler, request(name, list(range(10)), max_tokens=1, prompt_logprobs=1))
        step = scheduled(scheduler)
        assert parts(step) == [(name, 0, 10, True)]
        run(scheduler, step)


# ---------------------------------------------------------------------- stopping


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({}, [1, EOS], "stop", None),
        ({"stop_token_ids": [5]}, [1, 5], "stop", 5),
        ({"ignore_eos": True, "max_tokens": 3}, [EOS, EOS, EOS], "length", None),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, [EOS], "stop", EOS),
        ({"min_tokens": 3}, [EOS, EOS, EOS], "stop", None),
        ({"max_tokens": 2}, [1, EOS], "stop", None),
        ({"max_tokens": 2, "min_tokens": 2}, [EOS, 1], "length", None),
    ],
)
def test_stop_by_token(
    params: dict[str, Any], tokens: list[int], reason: str, stop_reason: int | None
) -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", **params))
    for token in tokens:
        assert not a.is_finished
        run(scheduler, scheduled(scheduler), token)
    assert (a.finish_reason, a.stop_reason, a.output_token_ids) == (reason, stop_reason, tokens)
    assert scheduler.cache.num_used == 0


def test_context_limit() -> None:
    scheduler = make(model_len=7)
    (a,) = added(scheduler, request("a", 5, max_tokens=None))
    while scheduler.has_work:
        run(scheduler, scheduled(scheduler))
    assert (a.num_tokens, a.finish_reason) == (7, "length")


def test_request_that_fills_the_whole_cache(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make(num_blocks=3)
    (a,) = added(scheduler, request("a", 6, max_tokens=50))
    with caplog.at_level(logging.WARNING):
        while scheduler.has_work:
            run(scheduler, scheduled(scheduler))
    # The last token is never computed, so it needs no slot.
    assert (a.num_tokens, a.finish_reason) == (9, "length")
    assert "fills the whole cache" in caplog.text


def test_stop_string_found_by_the_caller() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a"))
    run(scheduler, scheduled(scheduler))
    scheduler.finish(a, "stop", "END")
    assert (a.status, a.stop_reason) == (RequestStatus.FINISHED_STOPPED, "END")
    assert not scheduler.has_work
    assert scheduler.cache.num_used == 0


def test_stop_string_in_the_last_token_replaces_the_reason() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", max_tokens=1))
    run(scheduler, scheduled(scheduler))
    assert a.finish_reason == "length"
    scheduler.finish(a, "stop", "END")
    assert (a.finish_reason, a.stop_reason) == ("stop", "END")
    assert scheduler.stats().total_finished == {"stop": 1, "length": 0, "abort": 0, "error": 0}


# ---------------------------------------------------------------------- refusals


def test_refusals_leave_the_scheduler_usable() -> None:
    scheduler = make(num_blocks=4, model_len=20)
    (a,) = added(scheduler, request("a"))
    with pytest.raises(RequestError, match="'a'"):
        scheduler.add(request("a"))
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(request("b", 0))
    with pytest.raises(CapacityError, match=r"20 tokens.*context"):
        scheduler.add(request("c", 20))
    with pytest.raises(CapacityError, match=r"13 tokens.*cache"):
        scheduler.add(request("d", 13))
    added(scheduler, request("e", 12))
    assert scheduler.stats().num_waiting == 2
    assert parts(scheduled(scheduler))[0][0] == "a"
    assert a.first_scheduled_time is not None


@pytest.mark.parametrize(
    ("limits", "culprit"),
    [((0, 8, 8), "max_num_seqs"), ((8, 7, 8), "num_batched"), ((1, 8, 0), "max_model_len")],
)
def test_limits_are_checked(limits: tuple[int, int, int], culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        Scheduler(CacheManager(one_table(10, 4), True), *limits)


def test_requests_keep_their_rows() -> None:
    """From admission to the end; a row that comes free is the next one's."""
    scheduler = make(seqs=4)
    a, b, c, d = added(scheduler, *(request(name) for name in "abcd"))
    run(scheduler, scheduled(scheduler))
    first = scheduled(scheduler)
    assert [(each, each.row) for each in first.requests] == [(a, 1), (b, 2), (c, 3), (d, 4)]
    run(scheduler, first)
    second = scheduled(scheduler)
    assert second.step.rows == first.step.rows
    assert (second.step.admitted, second.step.released) == ([], [])
    run(scheduler, second)
    scheduler.abort("b")
    assert b.row == NULL_ROW
    added(scheduler, request("e"))
    mixed = scheduled(scheduler)
    assert mixed.step.rows == [1, 3, 4, 2]
    assert (mixed.step.released, [each.row for each in mixed.step.admitted]) == ([2], [2])
    run(scheduler, mixed)
    for _ in range(2):
        step = scheduled(scheduler)
        assert step.step.rows == [1, 3, 4, 2]
        run(scheduler, step)
    scheduler.abort("d")
    scheduler.abort("e")
    assert scheduled(scheduler).step.rows == [1, 3]


def test_a_step_is_plain_data() -> None:
    """It can be sent to another process, and block tables are sent once."""
    scheduler = make()
    (a,) = added(scheduler, request("a", [3, 4, 5], seed=9))
    table: list[int] = []
    for _ in range(6):
        step = scheduled(scheduler)
        sent = pickle.loads(pickle.dumps(step.step))
        assert (sent.rows, sent.counts, sent.samples) == ([1], step.step.counts, [True])
        for each in sent.edits[0]:
            assert (each.row, each.begin) == (1, len(table))
            table += each.blocks
        for each in sent.admitted:
            assert (each.start, each.token_ids, each.params.seed) == (0, [3, 4, 5], 9)
        assert table == a.tables[0]
        run(scheduler, step)
    assert len(table) == 2


# ---------------------------------------------------------------------- drafts


def test_drafts_that_count_are_taken_and_cut_at_a_stop() -> None:
    scheduler = make(drafts=3)
    (a,) = added(scheduler, request("a", max_tokens=20, stop_token_ids=[5]))
    first = scheduled(scheduler)
    assert (first.step.counts, first.step.drafts) == ([4], [0])
    second = scheduled(scheduler)
    assert (second.step.counts, second.step.drafts, second.step.num_tokens) == ([1], [3], 4)
    assert second.step.shape.query_len == 4
    assert scheduler.update(first.step, [[7]]) == [a]
    third = scheduled(scheduler)
    assert (a.num_computed_tokens, a.num_pending) == (12, 2)
    assert scheduler.update(second.step, [[8, EOS, 6]]) == [a]
    assert (a.output_token_ids, a.stop_reason) == ([7, 8, EOS], None)
    assert a.is_finished
    assert scheduler.update(third.step, [[1, 2, 3, 4]]) == []
    assert scheduler.cache.num_used == 0


def test_what_lies_behind_a_stop_string_is_dropped() -> None:
    scheduler = make(drafts=3)
    (a,) = added(scheduler, request("a", max_tokens=4))
    run(scheduler, scheduled(scheduler), 7)
    scheduler.update(scheduled(scheduler).step, [[1, 2, 3, 4]])
    assert (a.output_token_ids, a.finish_reason) == ([7, 1, 2, 3], "length")
    scheduler.finish(a, "stop", "END", surplus=2)
    assert (a.output_token_ids, a.finish_reason, a.stop_reason) == ([7, 1], "stop", "END")
    assert a.token_ids == [*a.prompt_token_ids, 7, 1]
    assert scheduler.stats().total_generated_tokens == 2


def test_updates_come_in_order_and_complete() -> None:
    scheduler = make()
    added(scheduler, request("a"))
    first, second = scheduled(scheduler), scheduled(scheduler)
    with pytest.raises(RuntimeError, match="oldest"):
        scheduler.update(second.step, [[1]])
    with pytest.raises(ValueError, match="0 results for 1"):
        scheduler.update(first.step, [])
    run(scheduler, first)
    with pytest.raises(RuntimeError, match="oldest"):
        run(scheduler, first)
    run(scheduler, second)


# ---------------------------------------------------------------------- preemption


def test_least_urgent_is_preempted_and_comes_back_first() -> None:
    scheduler = make(num_blocks=5, prefix_caching=False)
    a, b = added(scheduler, request("a", 8), request("b", 8))
    run(scheduler, scheduled(scheduler))
    (c,) = added(scheduler, request("c", 1))
    step = scheduled(scheduler)  # a needs a third block
    assert parts(step) == [("a", 8, 1, True)]
    assert step.released == ["b"]
    assert (b.status, b.num_preemptions, b.tables) == (RequestStatus.PREEMPTED, 1, [])
    run(scheduler, step)
    scheduler.finish(a, "stop", "END")
    step = scheduled(scheduler)
    assert step.released == ["a"]
    assert parts(step) == [("b", 0, 9, True), ("c", 0, 1, True)]
    assert b.output_token_ids == [1]
    assert c.num_preemptions == 0


def test_priority_decides_who_is_preempted() -> None:
    scheduler = make(num_blocks=5, prefix_caching=False)
    a, b = added(scheduler, request("a", 8, priority=1), request("b", 8))
    run(scheduler, scheduled(scheduler))
    assert parts(scheduled(scheduler)) == [("b", 8, 1, True)]
    assert (a.num_preemptions, b.num_preemptions) == (1, 0)


def test_preempted_request_finds_its_prefix_again() -> None:
    scheduler = make(num_blocks=6)
    a, b = added(scheduler, request("a", 8, max_tokens=2), request("b", 11))
    run(scheduler, scheduled(scheduler))
    run(scheduler, scheduled(scheduler))
    assert a.is_finished
    assert b.num_preemptions == 1
    # Of the three blocks of b, the last one held no full prefix and was taken.
    assert parts(scheduled(scheduler)) == [("b", 8, 4, True)]
    assert b.num_cached_tokens == 0
    assert scheduler.stats().total_prefix_queries == 19


# ---------------------------------------------------------------------- one step ahead


def test_decode_with_a_pending_token() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", max_tokens=3))
    first = scheduled(scheduler)
    second = scheduled(scheduler)
    assert parts(second) == [("a", 4, 1, True)]
    assert second.step.num_decodes == 1
    assert a.num_pending == 2
    run(scheduler, first, 5)
    assert (a.output_token_ids, a.num_pending) == ([5], 1)
    third = scheduled(scheduler)
    run(scheduler, second, 6)
    # The third step samples the last token: there is nothing to schedule ahead of it.
    assert scheduler.schedule() is None
    assert scheduler.has_work
    run(scheduler, third, 7)
    assert (a.output_token_ids, a.finish_reason) == ([5, 6, 7], "length")


def test_superfluous_token_is_dropped_and_blocks_wait_for_its_step() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", 8))
    first, second = scheduled(scheduler), scheduled(scheduler)
    assert run(scheduler, first, EOS) == [a]
    assert a.is_finished
    assert scheduler.cache.num_used == 3
    assert scheduler.schedule() is None
    assert scheduler.has_work
    assert run(scheduler, second, 5) == []
    assert a.output_token_ids == [EOS]
    assert scheduler.cache.num_used == 0
    assert not scheduler.has_work


def test_abort_while_a_step_is_outstanding() -> None:
    scheduler = make()
    a, b = added(scheduler, request("a"), request("b"))
    first = scheduled(scheduler)
    assert scheduler.abort("a") is a
    assert scheduler.abort("a") is None
    assert scheduler.abort("unknown") is None
    assert scheduler.cache.num_used == 2
    assert run(scheduler, first) == [b]
    assert (a.output_token_ids, a.finish_reason) == ([], "abort")
    assert scheduler.cache.num_used == 1
    assert scheduled(scheduler).released == ["a"]
    assert scheduled(scheduler).released == []


def test_abort_while_waiting() -> None:
    scheduler = make(seqs=1)
    names = [each.request_id for each in added(scheduler, *map(request, "abcdef"))]
    for name in names[1:5]:
        scheduler.abort(name)
    assert scheduler.stats().num_waiting == 2
    step = scheduled(scheduler)
    run(scheduler, step, EOS)
    step = scheduled(scheduler)
    assert parts(step)[0][0] == "f"
    assert step.released == ["a"]


def test_victim_with_a_pending_token_gets_it() -> None:
    scheduler = make(num_blocks=5, prefix_caching=False)
    a, b = added(scheduler, request("a", 8), request("b", 8))
    first = scheduled(scheduler)
    # a needs a block; b's come free with the first step only, and until then nobody runs.
    assert scheduler.schedule() is None
    assert b.status is RequestStatus.PREEMPTED
    assert scheduler.cache.num_used == 4
    assert run(scheduler, first, 5) == [a, b]
    assert b.output_token_ids == [5]
    assert scheduler.cache.num_used == 2
    step = scheduled(scheduler)
    assert parts(step) == [("a", 8, 1, True)]
    assert step.released == ["b"]


def test_victim_whose_pending_token_ends_it() -> None:
    scheduler = make(num_blocks=5, prefix_caching=False)
    _, b = added(scheduler, request("a", 8), request("b", 8))
    first = scheduled(scheduler)
    assert scheduler.schedule() is None
    run(scheduler, first, lambda each: EOS if each is b else 5)
    assert b.finish_reason == "stop"
    assert scheduler.stats().num_waiting == 0
    assert scheduled(scheduler).released == ["b"]


def test_blocks_of_a_step_are_listed_as_they_were() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", 8))
    step = scheduled(scheduler)
    blocks = list(a.tables[0])
    run(scheduler, step, EOS)
    assert a.tables == []
    assert step.step.edits[0][0].blocks == blocks


def test_start_over_forgets_steps_blocks_and_prefixes() -> None:
    scheduler = make(seqs=1)
    a, b = added(scheduler, request("a", 8), request("b", 8))
    scheduled(scheduler)
    lost = scheduled(scheduler)
    scheduler.start_over()
    assert (a.finish_reason, b.finish_reason) == ("abort", "abort")
    assert not scheduler.has_work
    assert scheduler.cache.num_used == 0
    with pytest.raises(RuntimeError, match="oldest"):
        run(scheduler, lost)
    (c,) = added(scheduler, request("a", 8, max_tokens=1))
    step = scheduled(scheduler)
    assert (parts(step), step.released) == ([("a", 0, 8, True)], [])
    run(scheduler, step)
    assert c.finish_reason == "length"
    assert scheduler.stats().total_finished == {"stop": 0, "length": 1, "abort": 2, "error": 0}


# ---------------------------------------------------------------------- numbers


def test_stats() -> None:
    scheduler = make(seqs=2)
    added(scheduler, request("a", max_tokens=2), request("b"), request("c"))
    for _ in range(2):
        run(scheduler, scheduled(scheduler))
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.total_steps) == (1, 1, 2)
    assert (stats.total_prefill_tokens, stats.total_decode_tokens) == (8, 2)
    assert stats.total_generated_tokens == 4
    assert (stats.num_blocks_used, stats.num_blocks) == (2, 99)
    assert stats.cache_usage == pytest.approx(2 / 99)
    assert stats.total_finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_times_are_in_order() -> None:
    scheduler = make()
    (a,) = added(scheduler, request("a", max_tokens=2))
    while scheduler.has_work:
        run(scheduler, scheduled(scheduler))
    times = [
        a.arrival_time,
        a.first_scheduled_time,
        a.first_token_time,
        a.last_token_time,
        a.finished_time,
    ]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    assert a.first_token_time != a.last_token_time


def test_a_state_is_copied_in_the_step_that_computes_on_and_not_promised_before() -> None:
    """A chunk waits for blocks at a place where others could go on from its request's state."""
    layout = CacheLayout(
        (TableLayout(Window(2), 1), TableLayout(State(8), 8, pool=1)),
        (PoolLayout(1, num_blocks=9), PoolLayout(1, num_blocks=5)),
    )
    scheduler = Scheduler(CacheManager(layout, True), 4, 8, 40, reserve_blocks=0)
    prompt = list(range(10))
    first, second = added(scheduler, request("a", prompt), request("b", prompt))
    step = scheduled(scheduler)
    assert (parts(step), step.step.copies) == ([("a", 0, 8, False)], [])
    assert scheduler.schedule() is None
    run(scheduler, step)
    step = scheduled(scheduler)
    assert parts(step) == [("a", 8, 2, True), ("b", 0, 5, False)]
    (copy,) = step.step.copies
    assert copy.source == first.tables[1][0] != second.tables[1][0] != copy.target


@pytest.mark.parametrize("ahead", [False, True])
def test_who_begins_with_a_prompt_of_the_same_step_reads_nothing_of_it(ahead: bool) -> None:
    """What is written in a step is read by nobody else in it: kernels may read older tokens before
    others have written. Nor in the next one, if the first is still under way."""
    scheduler = make()
    added(scheduler, request("a", 12), request("aa", 12))
    first = scheduled(scheduler)
    assert first.starts == [0, 0]
    added(scheduler, request("aaa", 12))
    if ahead:
        assert scheduled(scheduler).starts[-1] == 0
    scheduler.update(first.step, [[1], [1]])
    added(scheduler, request("aaaa", 12))
    assert scheduled(scheduler).starts[-1] == 8

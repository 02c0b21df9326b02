"""The step loop itself: requests that come and go while others run."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import TinyModel, TinyModels, assert_idle, generate, greedy, make_llm, random_ids

from reprise import LLM, SamplingParams
from reprise.engine import Engine
from reprise.errors import RequestError

STEPS = 20
PROMPTS = [random_ids(1, 20), random_ids(2, 45), random_ids(3, 3)]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device)


@pytest.fixture(scope="module")
def expected(llm: LLM, model: TinyModel) -> list[list[int]]:
    outputs = generate(llm, PROMPTS, greedy(STEPS))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert model.is_greedy(prompt, output)
    return outputs


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_requests_join_while_others_run(llm: LLM, expected: list[list[int]]) -> None:
    engine = llm.engine
    groups = []
    for number, prompt in enumerate(PROMPTS):
        groups.append(engine.add(f"join {number}", prompt, greedy(STEPS)))
        for _ in range(3):
            engine.step()
    finish(engine)
    assert [group.output().outputs[0].token_ids for group in groups] == expected
    assert_idle(llm)


def test_outputs_grow(llm: LLM, expected: list[list[int]]) -> None:
    """Each snapshot continues the one before it and does not change any more."""
    engine = llm.engine
    group = engine.add("grow", PROMPTS[0], greedy(STEPS, logprobs=0))
    snapshots = [group.output()]
    while engine.has_work:
        if group in engine.step():
            snapshots.append(group.output())
    assert [len(each.outputs[0].token_ids) for each in snapshots] == list(range(STEPS + 1))
    for each in snapshots:
        output = each.outputs[0]
        assert output.token_ids == expected[0][: len(output.token_ids)]
        assert len(output.logprobs or []) == len(output.token_ids)
        assert each.finished == output.finished() == (len(output.token_ids) == STEPS)


@pytest.mark.parametrize("after", [0, 1, 2, 7])
def test_abort(llm: LLM, expected: list[list[int]], after: int) -> None:
    engine = llm.engine
    groups = [
        engine.add("stay", PROMPTS[0], greedy(STEPS)),
        engine.add("leave", PROMPTS[1], greedy(STEPS, n=2)),
    ]
    for _ in range(after):
        engine.step()
    assert engine.abort(["leave", "unknown", "leave"]) == [groups[1]]
    assert engine.abort(["leave"]) == []
    finish(engine)
    stayed, left = (group.output() for group in groups)
    assert stayed.outputs[0].token_ids == expected[0]
    assert left.finished
    for completion in left.outputs:
        assert completion.finish_reason == "abort"
        assert completion.token_ids == expected[1][: len(completion.token_ids)]
    assert_idle(llm)


def test_an_id_can_be_used_again(model: TinyModel, device: str) -> None:
    """Nothing of the first request, such as its place in the block tables, is left behind."""
    llm = make_llm(model, device)
    engine = llm.engine
    for seed in range(4):
        others = [engine.add(f"other {n}", random_ids(50 + n, 9), greedy(4)) for n in range(seed)]
        prompt = random_ids(20 + seed, 24)
        group = engine.add("same", prompt, greedy(STEPS, repetition_penalty=1.0001))
        finish(engine)
        assert all(each.finished for each in others)
        assert model.is_greedy(prompt, group.output().outputs[0].token_ids)


def test_ids_are_unique_among_the_unfinished(llm: LLM, expected: list[list[int]]) -> None:
    engine = llm.engine
    first = engine.add("same", PROMPTS[0], greedy(STEPS))
    with pytest.raises(RequestError, match="'same'"):
        engine.add("same", PROMPTS[1], greedy(STEPS))
    # The second completion of "x" would be called like this one.
    second = engine.add("x#1", PROMPTS[1], greedy(STEPS))
    with pytest.raises(RequestError, match="'x#1'"):
        engine.add("x", PROMPTS[2], greedy(STEPS, n=3))
    finish(engine)
    assert [each.output().outputs[0].token_ids for each in (first, second)] == expected[:2]
    assert_idle(llm)


def test_an_id_like_that_of_a_finished_completion_is_a_request_of_its_own(
    llm: LLM, expected: list[list[int]]
) -> None:
    engine = llm.engine
    draws = SamplingParams(n=2, seed=3, max_tokens=60)
    first, second = (each.token_ids for each in llm.generate([PROMPTS[1]], draws)[0].outputs)
    early = next(token for token in first[:10] if token not in second)
    group = engine.add("a", PROMPTS[1], dataclasses.replace(draws, stop_token_ids=[early]))
    while not group.completions[0].request.is_finished:
        engine.step()
    assert not group.finished
    stranger = engine.add("a#0", PROMPTS[0], greedy(STEPS))
    engine.step()
    assert engine.abort(["a"]) == [group]
    finish(engine)
    assert stranger.output().outputs[0].token_ids == expected[0]
    assert_idle(llm)


def test_stats_and_times(llm: LLM) -> None:
    engine = llm.engine
    before = engine.stats().scheduler
    groups = [engine.add(f"time {n}", prompt, greedy(5)) for n, prompt in enumerate(PROMPTS)]
    assert engine.stats().num_requests == engine.stats().scheduler.num_waiting == 3
    engine.step()
    during = engine.stats()
    assert during.scheduler.num_running == 3
    assert during.scheduler.num_blocks_used >= 5
    assert 0 < during.scheduler.cache_usage <= 1
    finish(engine)
    after = engine.stats().scheduler
    assert after.total_generated_tokens - before.total_generated_tokens == 15
    assert after.total_finished["length"] - before.total_finished["length"] == 3
    for group in groups:
        times = group.output().metrics
        assert times.first_scheduled_time is not None
        assert times.first_token_time is not None
        assert times.finished_time is not None
        assert (
            times.arrival_time
            <= times.first_scheduled_time
            <= times.first_token_time
            <= times.finished_time
        )
        assert times.time_to_first_token == times.first_token_time - times.arrival_time


def test_a_long_prompt_does_not_stall_decodes(model: TinyModel, device: str) -> None:
    """While it is computed in chunks, every step still gives each running request a token."""
    llm = make_llm(model, device, max_num_seqs=4, max_num_batched_tokens=8)
    engine = llm.engine
    running = engine.add("running", [1, 2, 3], greedy(60))
    while not running.output().outputs[0].token_ids:
        engine.step()
    steps = engine.stats().scheduler.total_steps
    tokens = len(running.output().outputs[0].token_ids)
    long = engine.add("long", random_ids(9, 200), greedy(2))
    while not long.output().outputs[0].token_ids:
        engine.step()
    steps = engine.stats().scheduler.total_steps - steps
    assert steps >= 200 // 8
    assert len(running.output().outputs[0].token_ids) - tokens >= steps - 4
    finish(engine)


def test_completions_end_on_their_own(llm: LLM) -> None:
    params = SamplingParams(
        n=4, temperature=1.5, seed=3, max_tokens=40, stop_token_ids=list(range(20))
    )
    outputs = llm.generate([PROMPTS[0]], params)[0].outputs
    assert len({len(each.token_ids) for each in outputs}) > 1
    for each in outputs:
        assert each.finish_reason == ("stop" if each.token_ids[-1] < 20 else "length")
        assert all(token >= 20 for token in each.token_ids[:-1])
    assert_idle(llm)

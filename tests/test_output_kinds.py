"""Streams of deltas, of everything so far, and of one last output say the same."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from helpers import TinyModel, TinyModels, assert_idle, greedy, make_llm, text_model

from reprise import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from reprise.engine import Engine
from reprise.engine.completion import CompletionGroup

CUMULATIVE, DELTA, FINAL_ONLY = (
    RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY,
)  # fmt: skip
PROMPT = "Once upon a time"
STEPS = 40


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return text_model(tiny)


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device)


@pytest.fixture(scope="module")
def serve(model: TinyModel, device: str) -> Any:
    def run(body: Callable[[AsyncLLM], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            options: dict[str, Any] = {"dtype": "float32", "num_blocks": 129, "graph_mode": "none"}
            async with AsyncLLM(
                str(model.path), device=device, max_num_seqs=8, **options
            ) as served:
                return await asyncio.wait_for(body(served), 60)

        return asyncio.run(main())

    return run


async def items(
    llm: AsyncLLM, params: SamplingParams, pause: float, read: threading.Event
) -> list[RequestOutput]:
    found = []
    async for each in llm.generate(PROMPT, params):
        found.append(each)
        if params.output_kind is DELTA:
            read.set()
        await asyncio.sleep(pause)
    return found


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "completions": {"n": 3, "temperature": 1.5, "seed": 4},
    "logprobs": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    "whole vocabulary": {"temperature": 0, "logprobs": -1},
    "no text": {"temperature": 0, "detokenize": False},
    "stop never found": {"temperature": 0, "stop": ["no such text in it"]},
    "stop included": {"temperature": 0, "include_stop_str_in_output": True},
}


def content(output: RequestOutput) -> Any:
    """All but times and the last digits of log probabilities, which differ with the batch."""
    plain = [
        (
            each.index,
            each.text,
            each.token_ids,
            each.finish_reason,
            each.stop_reason,
            each.logprobs and [next(iter(entry)) for entry in each.logprobs],
        )
        for each in sorted(output.outputs, key=lambda each: each.index)
    ]
    return output.finished, output.prompt, output.prompt_token_ids, plain


@pytest.mark.covering(1)
@pytest.mark.parametrize("pause", [0, 0.005])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_they_say_the_same(
    llm: LLM, serve: Any, case: dict[str, Any], pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"max_tokens": STEPS, **case}
    if "include_stop_str_in_output" in values:
        text = llm.generate([PROMPT], SamplingParams(**values))[0].outputs[0].text
        values["stop"] = [text[20:23]]
    expected = llm.generate([PROMPT], SamplingParams(**values))[0]

    add, step, read, added = Engine.add, Engine.step, threading.Event(), list[CompletionGroup]()

    def notes_who_reads_deltas(engine: Engine, *what: Any) -> CompletionGroup:
        group = add(engine, *what)
        if group.params.output_kind is DELTA:
            added.append(group)
        return group

    def waits_for_the_first_delta(engine: Engine) -> Any:
        """To be read: on a busy machine too they do not all come as one."""
        if any(each.completions[0].request.num_output_tokens for each in added):
            assert read.wait(100)
        return step(engine)

    async def body(served: AsyncLLM) -> Any:
        kinds = (CUMULATIVE, DELTA, FINAL_ONLY)
        return await asyncio.gather(
            *(
                items(served, SamplingParams(**values, output_kind=kind), pause, read)
                for kind in kinds
            )
        )

    monkeypatch.setattr(Engine, "add", notes_who_reads_deltas)
    monkeypatch.setattr(Engine, "step", waits_for_the_first_delta)
    cumulative, deltas, final = serve(body)
    assert [content(each) for each in final] == [content(expected)]
    assert content(cumulative[-1]) == content(expected)
    for name, found in (("cumulative", cumulative), ("delta", deltas)):
        assert [each.finished for each in found] == [False] * (len(found) - 1) + [True], name
    # Each of these grew, and did not change when the next one came.
    for before, after in itertools.pairwise(cumulative):
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert new.text.startswith(old.text)
            assert new.token_ids[: len(old.token_ids)] == old.token_ids
    assert len(deltas) > 1
    for number, each in enumerate(deltas):
        assert number == 0 or each.prompt_logprobs is None
        assert number == 0 or all(out.token_ids or out.finished() for out in each.outputs)
    whole = deltas[0].copy()
    for each in deltas[1:]:
        whole.extend(each)
    assert content(whole) == content(expected)
    if "logprobs" in case:
        total = pytest.approx(expected.outputs[0].cumulative_logprob, abs=0.05)
        for each in (final[0], cumulative[-1], deltas[-1]):
            assert each.outputs[0].cumulative_logprob == total
    assert (deltas[0].prompt_logprobs is None) == (expected.prompt_logprobs is None)


def test_an_aborted_stream_of_deltas_ends_with_what_is_new(
    serve: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = greedy(200, output_kind=DELTA, detokenize=False)
    expected = llm.generate([PROMPT], greedy(200, detokenize=False))[0].outputs[0].token_ids
    step, allowed = Engine.step, threading.Semaphore(4)

    def waits_for_the_reader(engine: Engine) -> Any:
        allowed.acquire(timeout=50)
        return step(engine)

    async def body(served: AsyncLLM) -> list[RequestOutput]:
        found = []
        async for each in served.generate(PROMPT, params, "mine"):
            found.append(each)
            allowed.release()
            if len(found) == 5:
                await served.abort("mine")
        allowed.release(1000)
        return found

    monkeypatch.setattr(Engine, "step", waits_for_the_reader)
    found = serve(body)
    assert found[-1].outputs[0].finish_reason == "abort"
    lengths = [len(each.outputs[0].token_ids) for each in found]
    assert sum(lengths) < 200
    assert max(lengths[1:]) < 5
    tokens = [token for each in found for token in each.outputs[0].token_ids]
    assert tokens == expected[: len(tokens)]


def test_a_slow_reader_gets_every_token_once(serve: Any, llm: LLM) -> None:
    expected = llm.generate([PROMPT], greedy(STEPS))[0].outputs[0].token_ids

    async def body(served: AsyncLLM) -> list[RequestOutput]:
        found = []
        async for each in served.generate(PROMPT, greedy(STEPS, output_kind=DELTA)):
            found.append(each)
            while (await served.stats()).num_requests:  # it ends meanwhile
                await asyncio.sleep(0.01)
        return found

    found = serve(body)
    assert len(found) < STEPS / 2
    assert [token for each in found for token in each.outputs[0].token_ids] == expected


def test_work_of_a_delta_does_not_grow_with_what_is_known(llm: LLM) -> None:
    """Counted where it would show: what is read of the tokens so far."""

    class Counted(list[int]):
        read = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            self.read += len(found) if isinstance(key, slice) else 1
            return found

        def __iter__(self) -> Any:
            self.read += len(self)
            return super().__iter__()

    engine = llm.engine
    group = engine.add("counted", PROMPT, greedy(STEPS))
    tokens = group.completions[0].request.output_token_ids = Counted()
    while not group.finished:
        engine.step()
        group.delta()
    while engine.has_work:
        engine.step()
    # Once for the text, once more where it is no whole character, once for the delta.
    assert 2 * len(tokens) <= tokens.read <= 3 * len(tokens) == 3 * STEPS
    assert_idle(llm)


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({}, True), ({"detokenize": False}, True), ({"stop": ["never in this text"]}, True),
        ({"n": 2}, False), ({"logprobs": 1}, False),
    ],
)  # fmt: skip
def test_a_text_alone_is_what_a_delta_has(llm: LLM, options: dict[str, Any], alone: bool) -> None:
    """Whichever of the two is asked for in a step."""
    engine = llm.engine
    group = engine.add("alone", PROMPT, greedy(STEPS, **options))
    texts, tokens, taken = [""] * len(group.completions), [[] for _ in group.completions], 0  # type: ignore[var-annotated]
    turns = itertools.cycle((True, True, False))
    while not group.finished:
        engine.step()
        text = group.text_alone() if next(turns) else None
        taken += text is not None
        if text is not None:
            texts[0] += text[0]
            tokens[0] += text[1]
            continue
        for each in group.delta().outputs:
            texts[each.index] += each.text
            tokens[each.index] += each.token_ids
    engine.finish_steps()
    expected = group.output().outputs
    assert (texts, tokens) == ([e.text for e in expected], [e.token_ids for e in expected])
    assert taken > STEPS / 2 if alone else not taken
    assert_idle(llm)


def test_what_may_be_wrong_does_not_come_as_a_text_alone(llm: LLM) -> None:
    engine = llm.engine
    group = engine.add("suspect", PROMPT, greedy(STEPS))
    while not group.completions[0].num_tokens:
        engine.step()
    group.delta()
    group.completions[0].request.suspect_from = 1
    while group.completions[0].num_tokens < 3:
        engine.step()
    assert group.text_alone() is None
    assert group.delta().outputs[0].suspect_from == 1
    engine.abort(["suspect"])
    engine.finish_steps()


def test_the_offline_engine_returns_everything(llm: LLM) -> None:
    outputs = [
        llm.generate([PROMPT], greedy(STEPS, output_kind=kind))[0] for kind in RequestOutputKind
    ]
    assert content(outputs[0]) == content(outputs[1]) == content(outputs[2])
    assert len(outputs[0].outputs[0].token_ids) == STEPS


def test_parameters_may_change_once_they_are_submitted(serve: Any) -> None:
    async def body(served: AsyncLLM) -> list[int]:
        params = greedy(5, output_kind=FINAL_ONLY)
        stream = served.generate(PROMPT, params)
        params.max_tokens = 1
        params.temperature = -3
        return [len(each.outputs[0].token_ids) async for each in stream]

    assert serve(body) == [5]

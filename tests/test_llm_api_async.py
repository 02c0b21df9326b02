"""The streaming interface: many callers, who come, go and fail on their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from helpers import TinyModel, TinyModels, greedy, random_ids, text_model

from reprise import AsyncLLM, RequestOutput, SamplingParams
from reprise.errors import RepriseError, RequestError

PROMPTS = [random_ids(n, 3 + 9 * n) for n in range(5)]
STEPS = 24


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture
def run(model: TinyModel, device: str) -> Callable[[Callable[[AsyncLLM], Awaitable[None]]], None]:
    """Run a coroutine with an engine; afterwards the engine must be idle and its thread over."""

    def with_engine(body: Callable[[AsyncLLM], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            path = options.pop("model", model.path)
            async with AsyncLLM(
                str(path),
                **{
                    "device": device,
                    "dtype": "float32",
                    "max_num_seqs": 4,
                    "num_blocks": 65,
                    "graph_mode": "none",
                    "skip_tokenizer_init": path == model.path,
                    **options,
                },
            ) as llm:
                await asyncio.wait_for(body(llm), 60)
                await idle(llm)
            assert not llm._thread.is_alive()

        asyncio.run(main())

    return with_engine


async def idle(llm: AsyncLLM) -> None:
    """Aborted requests end between two steps: soon, not at once."""
    for _ in range(1000):
        stats = await llm.stats()
        if stats.num_requests == stats.scheduler.num_blocks_used == 0:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("requests or blocks are left")


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    final = None
    async for output in stream:
        assert final is None or not final.finished
        final = output
    assert final is not None
    assert final.finished
    return final


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_streams_side_by_side(run: Any, model: TinyModel) -> None:
    async def body(llm: AsyncLLM) -> None:
        outputs = await asyncio.gather(
            *(last(llm.generate(prompt, greedy(STEPS))) for prompt in PROMPTS)
        )
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert model.is_greedy(prompt, tokens(output))
            assert len(tokens(output)) == STEPS

    run(body)


def test_each_item_holds_everything_so_far(run: Any, tiny: TinyModels) -> None:
    async def body(llm: AsyncLLM) -> None:
        before, text = list[int](), ""
        async for output in llm.generate("Once upon a time", greedy(STEPS)):
            assert tokens(output)[: len(before)] == before
            assert output.outputs[0].text.startswith(text)
            before, text = tokens(output), output.outputs[0].text
            await asyncio.sleep(0.002)  # slower than the engine: states may be skipped
        assert len(before) == STEPS
        chat = await last(llm.chat([{"role": "user", "content": "hi"}], greedy(3)))
        assert chat.prompt == "<user>user: hi\nassistant:"

    run(body, model=text_model(tiny).path)


def test_leaving_early_aborts(run: Any, model: TinyModel) -> None:
    async def body(llm: AsyncLLM) -> None:
        other = asyncio.create_task(last(llm.generate(PROMPTS[1], greedy(STEPS))))
        async with contextlib.aclosing(llm.generate(PROMPTS[0], greedy(200))) as stream:
            async for _ in stream:
                break
        assert model.is_greedy(PROMPTS[1], tokens(await other))
        await idle(llm)
        assert (await llm.stats()).scheduler.total_finished["abort"] == 1

    run(body)


@pytest.mark.parametrize("moment", [0, 1, 3, 20])
def test_cancelling_tasks(run: Any, model: TinyModel, moment: int) -> None:
    """Also before the engine has taken the request. Others never notice."""

    async def body(llm: AsyncLLM) -> None:
        for _ in range(5):
            other = asyncio.create_task(last(llm.generate(PROMPTS[1], greedy(STEPS))))
            task = asyncio.create_task(last(llm.generate(PROMPTS[2], greedy(200))))
            for _ in range(moment):
                await asyncio.sleep(0)
            await asyncio.sleep(moment / 1000)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert model.is_greedy(PROMPTS[1], tokens(await other))

    run(body)


def test_abort_by_id(run: Any) -> None:
    async def body(llm: AsyncLLM) -> None:
        count = 0
        async for output in llm.generate(PROMPTS[0], greedy(200), "mine"):
            count += 1
            if count == 3:
                await llm.abort("mine")
                await llm.abort("nobody's")
        assert output.request_id == "mine"
        assert output.outputs[0].finish_reason == "abort"
        assert 3 <= len(tokens(output)) < 200
        again = await last(llm.generate(PROMPTS[0], greedy(5), "mine"))
        assert tokens(again)[:3] == tokens(output)[:3]

    run(body)


def test_bad_requests_reach_their_callers_only(run: Any, model: TinyModel) -> None:
    async def body(llm: AsyncLLM) -> None:
        good = asyncio.create_task(last(llm.generate(PROMPTS[1], greedy(STEPS), "good")))
        await asyncio.sleep(0.01)
        for prompt, params, name in (
            ([], greedy(3), None),
            ([10**6], greedy(3), None),
            ("text", greedy(3), None),
            (PROMPTS[0], greedy(3, stop_token_ids=[10**6]), None),
        ):
            with pytest.raises(RequestError):
                await last(llm.generate(prompt, params, name))
        assert model.is_greedy(PROMPTS[1], tokens(await good))

    run(body)


def test_a_failing_step_fails_all_requests_once(
    run: Any, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(llm: AsyncLLM) -> None:
        submit = llm.engine.runner.submit
        calls = 0

        def failing(step: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise RuntimeError("the device is gone")
            return submit(step)

        monkeypatch.setattr(llm.engine.runner, "submit", failing)
        tasks = [last(llm.generate(prompt, greedy(STEPS))) for prompt in PROMPTS]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(each) for each in results} == {"the device is gone"}
        after = await last(llm.generate(PROMPTS[3], greedy(STEPS)))
        assert model.is_greedy(PROMPTS[3], tokens(after))

    run(body)


def test_priorities(run: Any) -> None:
    async def body(llm: AsyncLLM) -> None:
        order: list[int] = []

        async def one(number: int, priority: int) -> None:
            await last(llm.generate(PROMPTS[0], greedy(60), priority=priority))
            order.append(number)

        await asyncio.gather(*(one(number, -number) for number in range(4)))
        # The first one runs already when the others arrive.
        assert order[1:] == sorted(order[1:], reverse=True)

    run(body, max_num_seqs=1)


def test_shutdown_ends_streams(model: TinyModel, device: str) -> None:
    async def main() -> None:
        llm = AsyncLLM(
            str(model.path), device=device, num_blocks=65, max_num_seqs=4,
            skip_tokenizer_init=True,
        )  # fmt: skip
        tasks = [
            asyncio.create_task(last(llm.generate(prompt, SamplingParams(max_tokens=200))))
            for prompt in PROMPTS
        ]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(llm.shutdown)
        llm.shutdown()  # again: nothing to do
        for output in await asyncio.wait_for(asyncio.gather(*tasks), 20):
            assert output.outputs[0].finish_reason in ("abort", "length")
        with pytest.raises(RepriseError, match="shut down"):
            await last(llm.generate(PROMPTS[0], greedy(3)))

    asyncio.run(main())

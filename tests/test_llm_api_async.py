"""The streaming interface under cancellation, priorities and shutdown at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from helpers import TinyModel, TinyModels, greedy, random_ids

from reprise import AsyncLLM, RequestOutput, SamplingParams
from reprise.errors import RepriseError

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
            defaults: dict[str, Any] = {
                "device": device,
                "dtype": "float32",
                "max_num_seqs": 4,
                "num_blocks": 65,
                "graph_mode": "none",
                "skip_tokenizer_init": True,
            }
            async with AsyncLLM(str(model.path), **{**defaults, **options}) as llm:
                await asyncio.wait_for(body(llm), 60)
                await idle(llm)
            assert not llm._driver.is_alive()

        asyncio.run(main())

    return with_engine


async def idle(llm: AsyncLLM) -> None:
    """Aborted requests end between two steps: soon, not at once."""
    async with asyncio.timeout(100):
        while True:
            stats = await llm.stats()
            if stats.num_requests == stats.scheduler.num_blocks_used == 0:
                return
            await asyncio.sleep(0.005)


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
            if task.cancel():  # on a busy machine this one may be late
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert model.is_greedy(PROMPTS[1], tokens(await other))

    run(body)


def test_priorities(run: Any) -> None:
    async def body(llm: AsyncLLM) -> None:
        order: list[int] = []

        async def one(number: int, priority: int) -> None:
            await last(llm.generate(PROMPTS[0], greedy(200), priority=priority))
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

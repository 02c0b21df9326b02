"""AsyncLLM when something fails beside a step: no caller waits for ever."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import pytest
import warm
from helpers import TinyModel, TinyModels, greedy, random_ids, take_time

from reprise import AsyncLLM, RequestOutput
from reprise.engine import CompletionGroup
from reprise.errors import RepriseError
from reprise.platforms import Platform

LONG = greedy(200)
Scenario = Callable[[AsyncLLM], Awaitable[None]]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def make(model: TinyModel, device: str) -> AsyncLLM:
    return AsyncLLM(
        str(model.path), device=device, dtype="float32", max_num_seqs=4, num_blocks=65,
        graph_mode="none", skip_tokenizer_init=True,
    )  # fmt: skip


@pytest.fixture
def run(model: TinyModel, device: str) -> Callable[[Scenario], None]:
    def with_engine(scenario: Scenario) -> None:
        async def main() -> None:
            async with make(model, device) as llm:
                await asyncio.wait_for(scenario(llm), 60)
            assert not llm._driver.is_alive()

        asyncio.run(main())

    return with_engine


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in stream][-1]


async def started(llm: AsyncLLM, count: int) -> list[asyncio.Task[RequestOutput]]:
    """Requests that run for long, each of which has its first tokens."""
    take_time(llm)
    running = []
    for seed in range(count):
        first = asyncio.Event()

        async def read(seed: int = seed, first: asyncio.Event = first) -> RequestOutput:
            stream = llm.generate(random_ids(seed, 5), LONG, f"long-{seed}")
            outputs = []
            async for output in stream:
                outputs.append(output)
                first.set()
            return outputs[-1]

        running.append(asyncio.create_task(read()))
        await first.wait()
    return running


async def serves(llm: AsyncLLM, model: TinyModel) -> bool:
    """As if nothing had been, and nothing is left of earlier requests."""
    prompt = random_ids(77, 9)
    output = await last(llm.generate(prompt, greedy(6)))
    stats = await llm.stats()
    assert stats.num_requests == stats.scheduler.num_blocks_used == 0
    return model.is_greedy(prompt, output.outputs[0].token_ids)


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt and SystemExit are not."""


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["submit", "stats"])
@pytest.mark.parametrize("error", [Stop("now"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_the_thread_ends(
    run: Any, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        running = await started(llm, 2)
        owner: Any = llm.engine.runner if where == "submit" else llm.engine
        monkeypatch.setattr(owner, where, raiser(error))
        asking = [llm.stats()] if where == "stats" else []
        results = await asyncio.gather(*running, *asking, return_exceptions=True)
        for each in results:
            assert isinstance(each, RepriseError)
            assert f"the engine's thread ended ({type(error).__name__}" in str(each)
        for late in (last(llm.generate([1], greedy(2))), llm.abort("x"), llm.stats()):
            with pytest.raises(RepriseError, match=r"thread ended .*create a new AsyncLLM"):
                await late

    run(scenario)


def test_a_tokenizer_that_panics(
    run: Any, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What libraries in Rust raise then is no Exception either; nobody waits for ever."""

    async def scenario(llm: AsyncLLM) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "prepare", raiser(Stop("index out of bounds")))
            with pytest.raises(RepriseError, match="Stop: index out of bounds"):
                await asyncio.wait_for(last(llm.generate("text", greedy(2))), 30)
        assert not llm._driver._preparing
        assert await serves(llm, model)

    run(scenario)


def test_the_thread_cannot_begin(
    model: TinyModel, device: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    activate = type(platform).activate

    def fail(self: Platform) -> None:
        if threading.current_thread().name == "reprise-engine":
            raise RuntimeError("no context")
        activate(self)

    monkeypatch.setattr(type(platform), "activate", fail)

    async def main() -> None:
        llm = make(model, device)
        with pytest.raises(RepriseError, match=r"thread ended \(RuntimeError: no context\)"):
            await asyncio.wait_for(last(llm.generate([1], greedy(2))), 60)
        llm.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize("what", ["abort", "leave"])
def test_an_abort_that_raises(
    run: Any, model: TinyModel, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        running = await started(llm, 3)
        with monkeypatch.context() as broken:
            broken.setattr(llm.engine, "abort", raiser(ValueError("half-way")))
            if what == "abort":
                with pytest.raises(ValueError, match="half-way"):
                    await llm.abort("long-1")
            else:
                running[1].cancel()
            results = await asyncio.gather(*running, return_exceptions=True)
        told = [each for each in results if isinstance(each, ValueError)]
        assert len(told) == (3 if what == "abort" else 2)
        assert await serves(llm, model)

    run(scenario)


def test_an_output_that_cannot_be_made(
    run: Any, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        running = await started(llm, 2)
        with monkeypatch.context() as broken:
            broken.setattr(CompletionGroup, "delta", raiser(ValueError("no text")))
            results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(each, ValueError) for each in results)
        assert await serves(llm, model)

    run(scenario)


@pytest.mark.parametrize("chat", [False, True])
def test_abort_during_tokenization(
    run: Any, model: TinyModel, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    held, begun = threading.Event(), threading.Event()

    class Slow:
        def encode(self, text: str, **_: Any) -> list[int]:
            begun.set()
            assert held.wait(30)
            return [1, 2, 3]

        special_tokens_map: ClassVar[dict[str, str]] = {}

        def get_chat_template(self, *_: Any) -> str:
            return "{{ messages[0].content }}"

    async def scenario(llm: AsyncLLM) -> None:
        monkeypatch.setattr(llm.engine, "tokenizer", Slow())
        params = greedy(200, detokenize=False)
        ask: Any = llm.chat if chat else llm.generate
        prompt: Any = [{"role": "user", "content": "x"}] if chat else "text"
        # The same id twice: both are meant. Another id is not.
        asked = [asyncio.create_task(last(ask(prompt, params, name))) for name in "aab"]
        assert await asyncio.to_thread(begun.wait, 30)
        await llm.abort("a")
        held.set()
        outputs = await asyncio.gather(*asked)
        assert [each.outputs[0].finish_reason for each in outputs] == ["abort", "abort", "length"]
        assert outputs[0].outputs[0].token_ids == []
        assert not llm._driver._preparing
        monkeypatch.setattr(llm.engine, "tokenizer", None)
        assert await serves(llm, model)

    run(scenario)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_process_an_error_says_so(model: TinyModel, device: str) -> None:
    llm = make(model, device)
    with llm._driver._lock:  # as if another thread had it
        child = os.fork()
    if child == 0:
        status = 1
        try:
            llm.shutdown()
            asyncio.run(asyncio.wait_for(last(llm.generate([1], greedy(2))), 20))
        except RepriseError as error:
            status = 0 if "forked" in str(error) else 2
        except BaseException:
            status = 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    async def parent() -> None:
        async with llm:
            assert await serves(llm, model)

    asyncio.run(parent())


def test_a_program_that_ends_meanwhile_ends_in_its_own_way(model: TinyModel, device: str) -> None:
    """The thread is in the midst of a library's code, which must not be unwound."""
    command = [sys.executable, warm.ENDS_MEANWHILE, str(model.path), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "terminate" not in done.stderr

"""AsyncLLM: streams of many callers over one engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, ClassVar

import pytest
from helpers import TinyModels, greedy, make_llm, random_ids, take_time, text_model

from reprise import AsyncLLM, RequestOutput, SamplingParams, platforms
from reprise.engine.tokenizing import EACH, LONG, is_long
from reprise.errors import CapacityError, RepriseError, RequestError
from reprise.platforms import Platform
from reprise.runner import ModelRunner

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_num_seqs": 4, "num_blocks": 65, "skip_tokenizer_init": True,
    "graph_mode": "none",
}  # fmt: skip


def run(tiny: TinyModels, device: str, scenario: Any) -> Any:
    async def main() -> Any:
        path = str(tiny("qwen3").path)
        async with AsyncLLM(path, device=device, **OPTIONS) as llm:
            return await asyncio.wait_for(scenario(llm), timeout=60)

    return asyncio.run(main())


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in stream][-1]


async def idle(llm: AsyncLLM) -> None:
    """Wait until nothing is left of any request."""
    while True:
        stats = await llm.stats()
        if stats.num_requests == 0 and stats.scheduler.num_blocks_used == 0:
            return
        await asyncio.sleep(0.01)


def test_concurrent_streams_equal_the_offline_engine(tiny: TinyModels, device: str) -> None:
    prompts = [random_ids(seed, 3 + seed) for seed in range(7)]
    llm = make_llm(tiny("qwen3"), device)
    inputs = [{"prompt_token_ids": each} for each in prompts]
    expected = [each.outputs[0].token_ids for each in llm.generate(inputs, greedy(24))]

    async def scenario(llm: AsyncLLM) -> list[list[int]]:
        outputs = await asyncio.gather(*(last(llm.generate(each, greedy(24))) for each in prompts))
        return [each.outputs[0].token_ids for each in outputs]

    assert run(tiny, device, scenario) == expected


def test_outputs_grow_and_only_the_last_is_finished(tiny: TinyModels, device: str) -> None:
    async def scenario(llm: AsyncLLM) -> list[RequestOutput]:
        return [each async for each in llm.generate(random_ids(1, 5), greedy(12))]

    outputs = run(tiny, device, scenario)
    lengths = [len(each.outputs[0].token_ids) for each in outputs]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 12
    assert [each.finished for each in outputs] == [False] * (len(outputs) - 1) + [True]


def test_text_grows_to_what_the_library_makes_of_all_ids(tiny: TinyModels, device: str) -> None:
    """Random models stop within characters; other streams are beside it."""
    path = str(text_model(tiny).path)
    params = [SamplingParams(max_tokens=20 + seed, seed=seed, temperature=2.0) for seed in range(6)]
    prompt = "👍🏽 "

    async def main() -> None:
        options = {**OPTIONS, "skip_tokenizer_init": False}
        async with AsyncLLM(path, device=device, **options) as llm:
            decode = llm.engine.tokenizer.backend_tokenizer.decode

            async def one(each: SamplingParams) -> None:
                texts = [""]
                async for output in llm.generate(prompt, each):
                    texts.append(output.outputs[0].text)
                    assert texts[-1].startswith(texts[-2])
                ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
                assert prompt + texts[-1] == decode(ids)

            await asyncio.wait_for(asyncio.gather(*map(one, params)), 60)

    asyncio.run(main())


def test_leaving_a_stream_aborts_its_request(tiny: TinyModels, device: str) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate(random_ids(1, 5), greedy(200))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await idle(llm)
        task = asyncio.create_task(last(llm.generate(random_ids(2, 5), greedy(200))))
        await asyncio.sleep(0.05)
        if task.cancel():  # on a busy machine this may be late
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(llm)

    run(tiny, device, scenario)


def test_abort_ends_the_stream(tiny: TinyModels, device: str) -> None:
    """Whatever else is given for an id ends nobody's."""

    async def scenario(llm: AsyncLLM) -> str | None:
        take_time(llm)
        stream = llm.generate(random_ids(1, 5), greedy(240), request_id="mine")
        assert len((await anext(stream)).outputs[0].token_ids) < 240
        for wrong in [["mine"]], [5], 5, None:
            with pytest.raises(RequestError, match="request_id="):
                await llm.abort(wrong)
            if wrong is not None:
                with pytest.raises(RequestError, match="request_id="):
                    await last(llm.generate([1], request_id=wrong))
        assert len((await anext(stream)).outputs[0].token_ids) < 240
        await llm.abort(["nobody's", "mine"])
        output = await last(stream)
        await idle(llm)
        return output.outputs[0].finish_reason

    assert run(tiny, device, scenario) == "abort"


@pytest.mark.parametrize(
    ("prompt", "kind"), [([], RequestError), ([1, 10**6], RequestError), ([1] * 999, CapacityError)]
)
def test_a_bad_request_harms_no_other(
    tiny: TinyModels, device: str, prompt: list[int], kind: type[Exception]
) -> None:
    async def scenario(llm: AsyncLLM) -> int:
        good = asyncio.create_task(last(llm.generate(random_ids(1, 5), greedy(30))))
        with pytest.raises(kind):
            await last(llm.generate(prompt, SamplingParams()))
        return len((await good).outputs[0].token_ids)

    assert run(tiny, device, scenario) == 30


def test_a_failing_step_is_told_to_its_callers_and_the_engine_serves_on(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = (await last(llm.generate(random_ids(1, 5), greedy(8)))).outputs[0].token_ids
        with monkeypatch.context() as broken:

            def fail(*_: Any) -> None:
                raise RuntimeError("the device is on fire")

            broken.setattr(llm.engine.runner, "submit", fail)
            waiting: list[Coroutine[Any, Any, RequestOutput]] = [
                last(llm.generate(random_ids(seed, 5), greedy(8))) for seed in (1, 2)
            ]
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert all("on fire" in str(each) for each in results)
        await idle(llm)
        again = await last(llm.generate(random_ids(1, 5), greedy(8)))
        assert again.outputs[0].token_ids == expected

    run(tiny, device, scenario)


def test_a_closed_engine_says_so(tiny: TinyModels, device: str) -> None:
    async def main() -> None:
        llm = AsyncLLM(str(tiny("qwen3").path), device=device, **OPTIONS)
        llm.shutdown()
        llm.shutdown()
        with pytest.raises(RepriseError, match="shut down"):
            await last(llm.generate([1], greedy(2)))

    asyncio.run(main())


def test_the_engines_thread_makes_its_device_current(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: set[str] = set()
    steps: set[str] = set()
    chosen = type(platforms.resolve(device))
    activate, submit = chosen.activate, ModelRunner.submit

    def activate_and_note(self: Platform) -> None:
        activate(self)
        current.add(threading.current_thread().name)

    def submit_and_note(self: ModelRunner, step: Any) -> Any:
        steps.add(threading.current_thread().name)
        return submit(self, step)

    monkeypatch.setattr(chosen, "activate", activate_and_note)
    monkeypatch.setattr(ModelRunner, "submit", submit_and_note)
    output = run(tiny, device, lambda llm: last(llm.generate([1, 2], greedy(3))))
    assert len(output.outputs[0].token_ids) == 3
    assert steps
    assert steps <= current
    llm = make_llm(tiny("qwen3"), device)

    async def elsewhere() -> None:
        await asyncio.to_thread(llm.generate, [[1, 2]], greedy(3), use_tqdm=False)

    asyncio.run(elsewhere())
    assert len(steps) == 2
    assert steps <= current


def test_a_long_text_keeps_nobody_waiting(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    class Slow:
        def encode(self, text: str, **_: Any) -> list[int]:
            assert text == "brief" or held.wait(30)
            return [1, 2, 3]

        special_tokens_map: Mapping[str, str] = {}

        def get_chat_template(self, *args: Any) -> str:
            assert held.wait(30)
            return "{{ raise_exception('no roles') }}"

    async def scenario(llm: AsyncLLM) -> tuple[RequestOutput, RequestOutput]:
        monkeypatch.setattr(llm.engine, "tokenizer", Slow())
        params = greedy(5, detokenize=False)
        slow = asyncio.create_task(last(llm.generate("text", params)))
        chat = asyncio.create_task(last(llm.chat([{"role": "user", "content": "x"}], params)))
        words = greedy(5, detokenize=False, bad_words=["a word"])
        wordy = asyncio.create_task(last(llm.generate([1, 2, 3], words)))
        quick = await last(llm.generate([1, 2, 3], params, request_id="quick"))
        assert not slow.done()
        assert not wordy.done()
        held.set()
        with pytest.raises(RequestError, match="no roles"):
            await chat
        await wordy
        return quick, await slow

    quick, slow = run(tiny, device, scenario)
    assert slow.outputs[0].token_ids == quick.outputs[0].token_ids


def test_a_long_text_keeps_no_short_one_waiting(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of a request it is that takes long to tokenize."""
    held, kinds = threading.Event(), 4

    class Slow:
        special_tokens_map: ClassVar[dict[str, str]] = {}

        def encode(self, text: str, **_: Any) -> list[int]:
            assert text == "brief" or held.wait(30)
            return [1, 2, 3]

        def get_chat_template(self, *_: Any) -> str:
            assert held.wait(30)
            return "{{ messages[0].content }}"

    async def scenario(llm: AsyncLLM) -> tuple[int, RequestOutput]:
        monkeypatch.setattr(llm.engine, "tokenizer", Slow())
        params, text = greedy(2, detokenize=False), "x" * LONG
        words = greedy(2, detokenize=False, bad_words=[f"{n}" for n in range(LONG // EACH)])
        long: list[Any] = [
            llm.generate(text, params),
            llm.generate({"prompt": text}, params),
            llm.generate([1, 2, 3], words),
            llm.chat([{"role": "user", "content": [{"type": "text", "text": text}]}], params),
        ]
        assert len(long) == kinds
        waiting = [asyncio.create_task(last(each)) for each in long]
        await asyncio.sleep(0)  # they are submitted
        brief = await asyncio.wait_for(last(llm.generate("brief", params)), 20)
        assert not any(each.done() for each in waiting)
        held.set()
        done = await asyncio.gather(*waiting)
        return len(done), brief

    assert run(tiny, device, scenario)[0] == kinds


def test_what_takes_long_is_known_in_no_time() -> None:
    assert is_long("x" * LONG)
    assert is_long([{"content": [{"text": "x" * (LONG // 2)}, "x" * (LONG // 2)]}], None)
    assert is_long({"bad_words": ["x"] * (LONG // EACH)})
    assert is_long({"prompt_token_ids": [1] * (LONG + 1)})
    assert not is_long("x" * (LONG // 2), [1, 2.0, None, True, b"x"], {"a": {}})
    endless: list[Any] = ["x"]
    endless.append(endless)
    assert is_long(endless)
    began = time.thread_time()
    assert is_long(["x"] * 10_000_000)
    assert time.thread_time() - began < 1.0

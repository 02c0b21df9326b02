"""A replay that raises costs its graph, and no request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers import TinyModels, assert_idle, make_llm, random_ids

from reprise import LLM, AsyncLLM, RequestOutput, SamplingParams
from reprise.errors import GraphReplayError

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 24, "block_size": 8,
    "graph_buckets": "decode=1,2,4;mixed=8,32",
}  # fmt: skip
PROMPTS = [random_ids(seed, 4 + 9 * seed) for seed in range(5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=0.8, seed=1, max_tokens=14, presence_penalty=0.7),
    SamplingParams(temperature=0.8, n=2, max_tokens=9),
    SamplingParams(temperature=0, max_tokens=11, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=17, frequency_penalty=0.5),
]


class Failing:
    """Every graph's replays share one count; those named spoil what they may write, and raise."""

    def __init__(self, llm: LLM | AsyncLLM, *at: int) -> None:
        self.replays = 0
        self.at = at
        self.graphs = llm.engine.runner.graphs
        for bucket in self.graphs.bucket_graphs.values():
            self._wrap(bucket, bucket.graph.replay)

    def _wrap(self, bucket: Any, replay: Any) -> None:
        def failing() -> None:
            replay()
            if self.replays in self.at:
                self.replays += 1
                for each in self.graphs.computation.outputs(bucket.shape).values():
                    each.fill_(float("nan"))
                for cache in self.graphs.computation.model.caches().values():
                    cache.tensors["key"].fill_(7.0)
                raise RuntimeError("launch failed")
            self.replays += 1

        bucket.graph.replay = failing


def results(outputs: list[RequestOutput]) -> list[Any]:
    return [
        (each.prompt_logprobs and [list(entry or ()) for entry in each.prompt_logprobs],
         [(one.token_ids, one.logprobs and [list(entry) for entry in one.logprobs])
          for one in each.outputs])
        for each in outputs
    ]  # fmt: skip


AT = [(0,), (5,), (4, 5, 9), (13, 14)]


@pytest.mark.parametrize(
    ("at", "executor", "depth"),
    [
        pytest.param(
            at, executor, depth,
            id=f"{at}-{executor}-{('in lockstep', 'one ahead')[depth - 1]}",
            # Short runs have every two of them.
            marks=[pytest.mark.long] * ((number + (executor == "full") + depth) % 2),
        )
        for number, at in enumerate(AT) for executor in ("full", "breakable") for depth in (1, 2)
    ],
)  # fmt: skip
def test_running_requests_are_computed_again(
    tiny: TinyModels, device: str, caplog: pytest.LogCaptureFixture,
    executor: str, depth: int, at: tuple[int, ...],
) -> None:  # fmt: skip
    model = tiny("qwen3")
    expected = make_llm(model, device, **OPTIONS).generate(PROMPTS, PARAMS, use_tqdm=False)
    llm = make_llm(model, device, **OPTIONS, graph_mode=executor)
    llm.engine.pipeline.depth = depth
    # A canary would have the eager result at hand.
    llm.engine.runner.graphs.ledger.trusts = lambda *asked: True  # type: ignore[method-assign]
    failing = Failing(llm, *at)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert failing.replays > max(at), "all of them were met"
    assert results(outputs) == results(expected)
    refused = llm.graph_report().quarantined
    assert len(refused) == len(at)
    assert all("replay: RuntimeError: launch failed" in str(each.quarantined) for each in refused)
    assert "running request(s) are computed again" in caplog.text
    assert_idle(llm)


@pytest.mark.parametrize("how", ["eager steps fail too", "the same graph is replayed for ever"])
def test_a_device_that_stays_broken_ends_the_requests(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    llm = make_llm(tiny("qwen3"), device, **OPTIONS, graph_mode="full")
    expected = results(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    graphs = llm.engine.runner.graphs
    with monkeypatch.context() as broken:

        def fail(*_: Any) -> None:
            raise RuntimeError("the device is gone")

        if how == "eager steps fail too":
            Failing(llm, *range(1000))
            broken.setattr(graphs.computation, "forward", fail)
        else:

            def refuse(*_: Any) -> None:
                raise GraphReplayError("the device is gone")

            broken.setattr(graphs, "run", refuse)
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert_idle(llm)
    assert results(llm.generate(PROMPTS, PARAMS, use_tqdm=False))[:2] == expected[:2]


def test_streams_go_on(tiny: TinyModels, device: str) -> None:
    model = tiny("qwen3")
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = make_llm(model, device, **OPTIONS).generate(PROMPTS, params, use_tqdm=False)

    async def scenario() -> list[list[int]]:
        options = {**OPTIONS, "dtype": "float32", "skip_tokenizer_init": True}
        async with AsyncLLM(str(model.path), device=device, graph_mode="full", **options) as llm:
            Failing(llm, 2, 9)

            async def last(prompt: list[int]) -> list[int]:
                tokens: list[list[int]] = [[]]
                async for output in llm.generate(prompt, params):
                    tokens.append(output.outputs[0].token_ids)
                assert [len(each) for each in tokens] == sorted(len(each) for each in tokens)
                return tokens[-1]

            running = asyncio.gather(*map(last, PROMPTS))
            return await asyncio.wait_for(running, 60)

    assert asyncio.run(scenario()) == [each.outputs[0].token_ids for each in expected]

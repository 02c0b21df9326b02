"""No wrong token, whatever callers do to an engine whose graphs are watched: ask for everything at
once, leave in the midst of a step, replace the weights, bring a model of odd sizes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    generate,
    greedy,
    make_llm,
    random_ids,
    random_model,
    text_model,
    token_ids,
)

from reprise import LLM, AsyncLLM, RequestOutput, SamplingParams
from reprise.graphs import GraphReport

WATCHED: dict[str, Any] = {
    "max_num_seqs": 6, "max_num_batched_tokens": 48, "block_size": 8, "num_blocks": 48,
    "max_model_len": 128, "graph_buckets": "decode=1,3,6;mixed=16,48", "graph_verify": "canary:1",
}  # fmt: skip
"""The cache holds three of the longest requests, so that traffic preempts."""
EXECUTORS = ["full", "breakable", pytest.param("compiled", marks=pytest.mark.long)]


def assert_no_alarm(report: GraphReport) -> None:
    assert [each.quarantined for each in report.quarantined] == []
    assert report.canary_failures == 0
    assert report.replays == report.canaries > 0


PROMPTS = [
    "Once upon a time",
    "Grüße aus Köln, señor!",
    "👍🏽 👩‍👩‍👧",
    "12 + 34 =",
    "漢字とかな",
    "the cat had",
]
ASKED = [
    {"stop": ["a", "漢"], "min_tokens": 6},
    {"stop": ["e"], "include_stop_str_in_output": True, "temperature": 0.9, "seed": 4},
    {"bad_words": ["a", "the", " cat", "é"], "temperature": 0},
    {"logit_bias": {5: 4.0, 9: -3.0}, "temperature": 0, "n": 2},
    {"n": 3, "seed": 8, "temperature": 1.3, "top_k": 30, "min_p": 0.01},
    {"allowed_token_ids": list(range(40, 200)), "temperature": 0.7, "seed": 1, "top_p": 0.9},
    {"logprobs": 4, "prompt_logprobs": 2, "temperature": 0},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": 0.2, "seed": 3},
    {"stop_token_ids": list(range(2, 340, 9)), "min_tokens": 3, "temperature": 1.0, "seed": 5},
    {"temperature": 0, "bad_words": ["o"], "logit_bias": {44: 2.0}, "stop": ["ing"], "logprobs": 1},
]


def everything(llm: LLM) -> list[Any]:
    """Of two rounds, the second with prefix hits: each completion's tokens, text, end and log
    probabilities."""
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(2 * len(ASKED))]
    params = [
        SamplingParams(max_tokens=8 + 3 * (number % 7), **ASKED[number % len(ASKED)])
        for number in range(2 * len(ASKED))
    ]
    found = []
    for _ in range(2):
        for output in llm.generate(prompts, params, use_tqdm=False):
            for each in output.outputs:
                told = [
                    {token: (one.rank, round(one.logprob, 3)) for token, one in place.items()}
                    for place in each.logprobs or ()
                ]
                found.append(
                    (each.token_ids, each.text, each.finish_reason, each.stop_reason, told)
                )
    assert_idle(llm)
    return found


@pytest.fixture(scope="module")
def worded(tiny: TinyModels) -> TinyModel:
    return text_model(tiny)


@pytest.fixture(scope="module")
def eagerly(worded: TinyModel, device: str) -> list[Any]:
    return everything(make_llm(worded, device, **WATCHED))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_all_that_requests_may_ask_for_at_once(
    worded: TinyModel, device: str, eagerly: list[Any], executor: str
) -> None:
    llm = make_llm(worded, device, **WATCHED, graph_mode=executor)
    assert everything(llm) == eagerly
    assert {each[2] for each in eagerly} == {"stop", "length"}
    assert_no_alarm(llm.graph_report())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_who_leaves_in_the_midst_of_a_step_harms_nobody(
    tiny: TinyModels, device: str, executor: str
) -> None:
    """Their rows and blocks are others' in the next step."""
    model = tiny("qwen3")
    prompts = [random_ids(n, 4 + 7 * n) for n in range(10)]
    draw = random.Random(3)

    async def stays(llm: AsyncLLM, prompt: list[int]) -> RequestOutput:
        await asyncio.sleep(draw.random() / 4)
        return [each async for each in llm.generate(prompt, greedy(16))][-1]

    async def leaves(llm: AsyncLLM, number: int) -> None:
        prompt = random_ids(50 + number, draw.randrange(1, 90))
        stream = llm.generate(prompt, SamplingParams(max_tokens=35, seed=number, n=1 + number % 2))
        task = asyncio.ensure_future(anext(stream, None))  # it may have ended already
        for _ in range(number % 4):
            await task
            task = asyncio.ensure_future(anext(stream, None))
        await asyncio.sleep(draw.random() / 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if number % 3:
            await stream.aclose()

    async def main() -> tuple[list[RequestOutput], GraphReport]:
        options = {**WATCHED, "dtype": "float32", "skip_tokenizer_init": True}
        async with AsyncLLM(str(model.path), device=device, graph_mode=executor, **options) as llm:
            staying = [asyncio.create_task(stays(llm, each)) for each in prompts]
            leaving = [asyncio.create_task(leaves(llm, number)) for number in range(24)]
            async with asyncio.timeout(200):
                await asyncio.gather(*leaving)
                outputs = await asyncio.gather(*staying)
                while (await llm.stats()).num_requests:
                    await asyncio.sleep(0.01)
                assert (await llm.stats()).scheduler.num_blocks_used == 0
            return outputs, llm.engine.runner.graphs.report()

    outputs, report = asyncio.run(main())
    for prompt, output in zip(prompts, token_ids(outputs), strict=True):
        assert len(output) == 16
        assert model.is_greedy(prompt, output)
    assert_no_alarm(report)


def test_weights_are_of_one_update_or_the_other(tiny: TinyModels, device: str) -> None:
    """A thread replaces them again and again while others generate: an answer is the one model's or
    the other's, and no graph is blamed."""
    models = [tiny("qwen3"), tiny("qwen3", seed=7)]
    states = [random_model("qwen3", seed).state_dict() for seed in (0, 7)]
    prompts = [random_ids(n, 5 + 9 * n) for n in range(4)]
    right = [generate(make_llm(each, device), prompts, greedy(10)) for each in models]
    llm = make_llm(models[0], device, **WATCHED, graph_mode="full")

    def answers(rounds: int) -> list[list[list[int]]]:
        inputs = [{"prompt_token_ids": each} for each in prompts]
        return [token_ids(llm.generate(inputs, greedy(10), use_tqdm=False)) for _ in range(rounds)]

    def replace(rounds: int) -> None:
        for number in range(rounds):
            llm.update_weights(states[(number + 1) % 2])

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(answers, 5), pool.submit(answers, 5)]
        pool.submit(replace, 7).result()
        assert all(each in right for one in found for each in one.result())
    assert answers(1) == [right[1]]
    assert_no_alarm(llm.graph_report())


ODD: Sequence[tuple[str, str, dict[str, Any]]] = [
    ("full", "llama", {"num_hidden_layers": 1, "vocab_size": 17}),
    ("breakable", "qwen3", {"hidden_size": 24, "intermediate_size": 7, "vocab_size": 131}),
    ("full", "qwen3", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}),
    (
        "breakable",
        "llama",
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    ),
    ("full", "llama", {"head_dim": 80, "rms_norm_eps": 0.0, "tie_word_embeddings": True}),
    ("full", "mistral", {"sliding_window": 1}),
    ("breakable", "mistral", {"sliding_window": 8, "num_hidden_layers": 1}),
    ("full", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}),
    ("breakable", "llama", {"intermediate_size": 1, "max_position_embeddings": 57}),
]


@pytest.mark.parametrize(
    ("executor", "architecture", "fields"), ODD, ids=[f"{one}, {each}" for one, _, each in ODD]
)
def test_models_of_odd_sizes(
    tiny: TinyModels, device: str, executor: str, architecture: str, fields: dict[str, Any]
) -> None:
    model = tiny(architecture, **fields)
    vocab = fields.get("vocab_size", 160)
    longest = fields.get("max_position_embeddings", 128)
    prompts = [random_ids(n, 1 + 13 * n, vocab) for n in range(4)]
    options = {**WATCHED, "max_model_len": longest}
    llm = make_llm(model, device, **options, graph_mode=executor)
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(14)), strict=True):
        assert model.is_greedy(prompt, output)
    assert_no_alarm(llm.graph_report())

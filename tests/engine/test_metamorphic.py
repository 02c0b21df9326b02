"""Same tokens, whatever runs beside a request and however its computation is cut into steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from helpers import (
    ARCHITECTURES,
    TinyModel,
    TinyModels,
    assert_idle,
    copied_inputs,
    generate,
    greedy,
    make_llm,
    random_ids,
    token_ids,
)

from reprise import LLM, SamplingParams

STEPS = 24
SHARED = random_ids(100, 48)
PROMPTS = [
    random_ids(1, 1),
    random_ids(2, 16),
    [*SHARED, *random_ids(3, 5)],
    random_ids(4, 70),
    [*SHARED, *random_ids(5, 20)],
    random_ids(6, 33),
]
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, seed=7, max_tokens=STEPS)
ONLY_ONE_STEP = {"max_num_batched_tokens": 512}


@dataclass
class Known:
    """A model with what it answers to each prompt alone."""

    model: TinyModel
    greedy: list[list[int]]
    sampled: list[list[int]]
    windowed: bool
    """Every second layer sees only a window."""

    @property
    def tight(self) -> dict[str, Any]:
        """A cache that holds the longest request and little more; windows need less."""
        size: dict[str, Any] = {"num_blocks": 19}
        if self.windowed:
            size = {"num_blocks": 13, "max_num_batched_tokens": 8}
        return {"block_size": 8, "max_model_len": 128, **size}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def known(request: pytest.FixtureRequest, tiny: TinyModels, device: str) -> Known:
    fields: dict[str, Any] = {}
    if request.param == "qwen3":  # every second layer sees only a window
        fields = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model = tiny(request.param, **fields)
    llm = make_llm(model, device, **ONLY_ONE_STEP, enable_prefix_caching=False)
    alone = [generate(llm, [prompt], greedy(STEPS))[0] for prompt in PROMPTS]
    for prompt, output in zip(PROMPTS, alone, strict=True):
        assert model.is_greedy(prompt, output)
    sampled = [generate(llm, [prompt], SAMPLED)[0] for prompt in PROMPTS]
    return Known(model, alone, sampled, bool(fields))


def check(known: Known, llm: LLM) -> None:
    assert generate(llm, PROMPTS, greedy(STEPS)) == known.greedy
    assert generate(llm, PROMPTS, SAMPLED) == known.sampled


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="in one batch"),
        pytest.param({"max_num_seqs": 2}, id="two at a time"),
        pytest.param({"max_num_seqs": 1, "max_num_batched_tokens": 1}, id="chunks of 1"),
        pytest.param({"max_num_seqs": 4, "max_num_batched_tokens": 7}, id="chunks of 7"),
        pytest.param({"max_num_batched_tokens": 64}, id="chunks of 64"),
        pytest.param({"block_size": 8}, id="blocks of 8"),
        pytest.param({"block_size": 32}, id="blocks of 32"),
        pytest.param({"enable_prefix_caching": False}, id="no prefix cache"),
    ],
)
def test_steps(known: Known, device: str, options: dict[str, Any]) -> None:
    check(known, make_llm(known.model, device, **options))


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("mode", "buckets"),
    [("decode=full", "2,8"), ("breakable", "2,8,64")],
    ids=["full", "breakable"],
)
def test_graphs(known: Known, device: str, mode: str, buckets: str) -> None:
    llm = make_llm(known.model, device, graph_mode=mode, graph_buckets=buckets)
    check(known, llm)
    report = llm.graph_report()
    assert report.replays > STEPS
    assert report.quarantined == []


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="eager"),
        pytest.param({"block_size": 8, "num_blocks": 19, "max_model_len": 128}, id="preemption"),
        pytest.param({"graph_mode": "breakable", "graph_buckets": "4,8,64"}, id="padding"),
    ],
)
def test_one_step_ahead(
    known: Known, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """As on an accelerator: a step is scheduled before the last one's tokens are known, and its
    inputs are copied to the device."""
    copied_inputs(monkeypatch)
    llm = make_llm(known.model, device, **options)
    llm.engine.pipeline.depth = 2
    check(known, llm)
    stops = [prompt_output[STEPS // 2] for prompt_output in known.greedy]
    params = [greedy(STEPS, stop_token_ids=[stop], logprobs=0, n=2) for stop in stops]
    outputs = llm.generate(PROMPTS, params)
    for output, stop, expected in zip(outputs, stops, known.greedy, strict=True):
        for completion in output.outputs:
            assert completion.token_ids == expected[: expected.index(stop) + 1]
            assert len(completion.logprobs or []) == len(completion.token_ids)
    assert_idle(llm)


@pytest.mark.covering(1)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_tiny_blocks(known: Known, device: str, block_size: int) -> None:
    if device != "cpu":
        pytest.skip("accelerator kernels read blocks of at least 8 tokens")
    check(known, make_llm(known.model, device, block_size=block_size, num_blocks=1025))


def test_neighbours_come_and_go(known: Known, device: str) -> None:
    """Strangers of other lengths and parameters, and in another order."""
    llm = make_llm(known.model, device)
    prompts: list[list[int]] = []
    params: list[SamplingParams] = []
    for index, prompt in enumerate(reversed(PROMPTS)):
        prompts += [random_ids(200 + index, 3 + 11 * index), prompt]
        stranger = SamplingParams(
            temperature=1.5,
            max_tokens=3 + 5 * index,
            logprobs=2,
            frequency_penalty=1.0,
            logit_bias={3: 50.0},
        )
        params += [stranger, greedy(STEPS)]
    assert generate(llm, prompts, params)[1::2] == known.greedy[::-1]


def test_second_time_comes_from_the_prefix_cache(known: Known, device: str) -> None:
    llm = make_llm(known.model, device)
    first = llm.generate(PROMPTS, greedy(STEPS))
    again = llm.generate(PROMPTS, greedy(STEPS))
    assert token_ids(first) == token_ids(again) == known.greedy
    for prompt, output in zip(PROMPTS, again, strict=True):
        # All full blocks, but at least one token is left to compute.
        assert output.metrics.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert llm.stats().scheduler.total_prefix_hits > 0
    llm.reset_prefix_cache()
    fresh = llm.generate(PROMPTS[:2], greedy(STEPS))
    assert token_ids(fresh) == known.greedy[:2]
    assert [each.metrics.num_cached_tokens for each in fresh] == [0, 0]


def test_prompts_share_a_beginning(known: Known, device: str) -> None:
    llm = make_llm(known.model, device)
    generate(llm, [PROMPTS[2]], greedy(1))
    output = llm.generate([PROMPTS[4]], greedy(STEPS))[0]
    assert output.metrics.num_cached_tokens == len(SHARED) // 16 * 16
    assert output.outputs[0].token_ids == known.greedy[4]


def test_a_conversation_continues_from_generated_blocks(known: Known, device: str) -> None:
    """Blocks that were filled while decoding serve as a prefix like those of a prompt."""
    llm = make_llm(known.model, device)
    prompt, answer = PROMPTS[3], known.greedy[3]
    generate(llm, [prompt], greedy(STEPS))
    output = llm.generate([[*prompt, *answer[:20]]], greedy(STEPS - 20))[0]
    assert output.metrics.num_cached_tokens == (len(prompt) + 20 - 1) // 16 * 16
    assert output.outputs[0].token_ids == answer[20:]


@pytest.mark.covering(1)
@pytest.mark.parametrize("caching", [True, False])
def test_preemption(known: Known, device: str, caching: bool) -> None:
    """The cache holds the longest request and little more."""
    llm = make_llm(
        known.model, device, **known.tight,
        enable_prefix_caching=caching,
    )  # fmt: skip
    for params, expected in ((greedy(STEPS), known.greedy), (SAMPLED, known.sampled)):
        outputs = llm.generate(PROMPTS, params)
        assert token_ids(outputs) == expected
        assert sum(each.metrics.num_preemptions for each in outputs) > 0
        assert_idle(llm)


def test_preemption_of_penalised_requests(known: Known, device: str) -> None:
    """What the sampler remembers of a request survives its preemption."""
    params = SamplingParams(
        temperature=0,
        max_tokens=STEPS,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
    )
    roomy = make_llm(known.model, device)
    alone = [generate(roomy, [prompt], params)[0] for prompt in PROMPTS]
    tight = make_llm(known.model, device, **known.tight)
    outputs = tight.generate(PROMPTS, params)
    assert sum(each.metrics.num_preemptions for each in outputs) > 0
    assert token_ids(outputs) == alone


def test_priority_changes_the_order_only(known: Known, device: str) -> None:
    llm = make_llm(known.model, device, max_num_seqs=1)
    outputs = llm.generate(PROMPTS[:3], greedy(STEPS), priority=[2, 1, 0])
    assert token_ids(outputs) == known.greedy[:3]
    finished = [each.metrics.finished_time for each in outputs]
    assert finished == sorted(finished, reverse=True)


def test_three_completions(known: Known, device: str) -> None:
    llm = make_llm(known.model, device)
    outputs = llm.generate(PROMPTS, greedy(STEPS, n=3))
    for output, expected in zip(outputs, known.greedy, strict=True):
        assert [each.token_ids for each in output.outputs] == [expected] * 3
        assert [each.index for each in output.outputs] == [0, 1, 2]

    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=STEPS)
    first = llm.generate(PROMPTS[1], params)[0].outputs
    texts = [tuple(each.token_ids) for each in first]
    assert len(set(texts)) == 3
    crowded = llm.generate([*PROMPTS[2:], PROMPTS[1]], params)[-1].outputs
    assert [tuple(each.token_ids) for each in crowded] == texts
    assert_idle(llm)


def test_the_engines_seed(known: Known, device: str) -> None:
    """Requests without a seed differ from each other and repeat with the engine."""
    params = SamplingParams(temperature=1.0, max_tokens=STEPS)
    prompts = [PROMPTS[1]] * 3
    runs = [
        generate(make_llm(known.model, device, seed=seed), prompts, params) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert len({tuple(each) for each in [*runs[0], *runs[2]]}) == 6

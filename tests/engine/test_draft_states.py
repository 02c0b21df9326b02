"""Recurrent states beside drafts: where others can go on from them, and what they give."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from drafting import metrics, rate
from helpers import TinyModel, TinyModels, assert_idle, generate, greedy, make_llm, random_ids

from reprise import LLM, SamplingParams

CHUNK = 64
"""A state is copied behind multiples of so many tokens while a request goes on."""
PROMPT = [*random_ids(20, 30), *random_ids(21, 4) * 6]
CONTEXT = {"num_blocks": 257, "max_num_seqs": 4, "max_model_len": 512}


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    """Its texts soon repeat themselves, so that drafts count."""
    return tiny("qwen3_5", num_hidden_layers=2, full_attention_interval=2, hidden_size=32)


def drafting(tokens: int, **others: Any) -> dict[str, Any]:
    return {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": tokens,
            "prompt_lookup_max": 3, "prompt_lookup_min": 1, **others,
        }
    }  # fmt: skip


def follow_up(llm: LLM, text: list[int], number: int) -> tuple[int, list[int]]:
    """How much is found of a prompt that begins with the text, and what follows it."""
    (output,) = llm.generate([[*text, *random_ids(number, 3)]], greedy(12), use_tqdm=False)
    assert_idle(llm)
    return output.metrics.num_cached_tokens, list(output.outputs[0].token_ids)


def chosen(max_tokens: int) -> SamplingParams:
    """Of so few tokens that about every second draft counts."""
    return SamplingParams(temperature=1, seed=8, allowed_token_ids=[7, 9], max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("tokens", "depth"),
    [(1, 2), (3, 2), (7, 1), *(pytest.param(*each, marks=pytest.mark.long)
                               for each in ((1, 1), (2, 1), (2, 2), (3, 1), (5, 2), (7, 2)))],
)  # fmt: skip
def test_a_hit_is_as_deep_as_without_drafts(
    model: TinyModel, device: str, tokens: int, depth: int
) -> None:
    """Behind whatever a conversation has got so far: its states stand where no step begins."""
    plain, llm = (
        make_llm(model, device, **CONTEXT, **options) for options in ({}, drafting(tokens))
    )
    llm.engine.pipeline.depth = depth
    for number in range(CHUNK * 2 - 1, CHUNK * 2 + 8, 3):
        # It ends a few tokens before and behind a place where a state is kept.
        params = chosen(number - len(PROMPT))
        (output,) = generate(plain, [PROMPT], params)
        assert generate(llm, [PROMPT], params) == [output]
        text = [*PROMPT, *output]
        found, expected = follow_up(plain, text, number)
        depth_of, tokens_of = follow_up(llm, text, number)
        assert tokens_of == expected
        assert depth_of >= found >= CHUNK
        for each in (plain, llm):
            each.reset_prefix_cache()
    assert metrics(llm)["spec_decode_num_accepted_tokens"] > 50


def by_model(draft: TinyModel, tokens: int, **others: Any) -> dict[str, Any]:
    config = {"method": "draft_model", "model": str(draft.path), "num_speculative_tokens": tokens}
    return {"speculative_config": {**config, **others}}


def check_always_right(llm: LLM, expected: list[list[list[int]]]) -> None:
    """Greedy and with seeds, twice, the second time behind what the first one left; one step ahead,
    beside others, and computed again now and then."""
    inner = llm.engine
    inner.pipeline.depth = 2
    for round in range(2):
        for params, right in zip(DRAWS, expected, strict=True):
            groups = [inner.add(f"{n}", prompt, params) for n, prompt in enumerate(PROMPTS)]
            for number in itertools.count():
                if not inner.has_work:
                    break
                if round and number % 9 == 8:
                    inner.scheduler.recompute()
                inner.step()
            assert [list(each.output().outputs[0].token_ids) for each in groups] == right
    assert rate(llm) == 1
    assert_idle(llm)


DRAWS = (greedy(30), SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=30))
PROMPTS = [PROMPT, random_ids(30, 70), random_ids(31, 1), [*PROMPT, *random_ids(32, 40)]]
EXECUTORS: dict[str, dict[str, Any]] = {
    "eager": {},
    "full": {"graph_mode": "full", "graph_buckets": "decode=2,4;mixed=32"},
    "breakable": {"graph_mode": "breakable", "graph_buckets": "decode=4;mixed=64"},
}


@pytest.fixture(scope="module")
def alone(model: TinyModel, device: str) -> list[list[list[int]]]:
    llm = make_llm(model, device, enable_prefix_caching=False, **CONTEXT)
    return [[generate(llm, [prompt], params)[0] for prompt in PROMPTS] for params in DRAWS]


@pytest.mark.parametrize(
    ("tokens", "executor"),
    [
        (3, "eager"), (4, "full"),
        *(pytest.param(*each, marks=pytest.mark.long)
          for each in ((1, "eager"), (2, "full"), (7, "full"), (3, "breakable"))),
    ],
)  # fmt: skip
def test_a_hybrid_as_its_own_draft_is_always_right(
    model: TinyModel, device: str, alone: list[list[list[int]]], tokens: int, executor: str
) -> None:
    options = {**CONTEXT, **EXECUTORS[executor], "max_num_batched_tokens": 64}
    llm = make_llm(model, device, **options, **by_model(model, tokens))
    check_always_right(llm, alone)
    assert llm.stats().scheduler.total_prefix_hits > 0
    report = llm.graph_report()
    assert not report.quarantined
    if executor != "eager":
        replayed = {each.owner for each in report.graphs if each.replays}
        assert replayed == {"", "draft prefill", "draft chain"}

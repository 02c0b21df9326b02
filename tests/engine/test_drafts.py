"""Drafts change how many tokens come of a step, and no token."""

from __future__ import annotations

import functools
import logging
import random
from typing import Any

import pytest
from drafting import check_counters, metrics
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    copied_inputs,
    generate,
    greedy,
    make_llm,
    random_ids,
)
from matrix import ahead_of_its_tokens
from planted import planted

from reprise import LLM, SamplingParams
from reprise.errors import ConfigError
from reprise.graphs import prove
from reprise.shape import StepShape
from reprise.speculation import parse_speculation
from reprise.testing.faults import FAULTS
from reprise.testing.faults.planted import PlantedFault

NGRAM: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PATTERN = random_ids(1, 6)
PROMPTS = [PATTERN * 6, random_ids(2, 40), [*random_ids(3, 20), *PATTERN * 2], [7, 8] * 15]
PARAMS = [
    greedy(40),
    SamplingParams(temperature=0.8, seed=5, max_tokens=40),
    SamplingParams(temperature=0.8, seed=5, max_tokens=40, top_k=20, top_p=0.9, min_p=0.01),
    greedy(40, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(temperature=0.6, seed=2, max_tokens=33, frequency_penalty=0.8),
    greedy(40, logit_bias={3: 1.5, 4: -2.0}, allowed_token_ids=list(range(80))),
    greedy(37, logprobs=3),
    greedy(40, min_tokens=25, stop_token_ids=list(range(0, 160, 4))),
    greedy(40, stop_token_ids=list(range(0, 160, 16))),
]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def drafting(model: TinyModel, device: str, tokens: int, **options: Any) -> LLM:
    config = {**NGRAM, "num_speculative_tokens": tokens}
    return make_llm(model, device, speculative_config=config, **options)


def answers(llm: LLM, params: SamplingParams) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": each} for each in PROMPTS], params, use_tqdm=False)
    assert_idle(llm)
    return [each.outputs[0] for each in outputs]


@pytest.fixture(scope="module")
def plain_answers(model: TinyModel, device: str) -> list[list[Any]]:
    """Of each of the parameters, without drafts."""
    plain = make_llm(model, device)
    return [answers(plain, params) for params in PARAMS]


@pytest.mark.parametrize(
    ("tokens", "options", "ahead"),
    [
        pytest.param(
            tokens, options, ahead, id=f"{name}{', ahead' * ahead}",
            marks=[pytest.mark.long] * (ahead == (tokens in (1, 3))),
        )
        for name, tokens, options in (
            ("1, full", 1, {"graph_mode": "full", "graph_buckets": "decode=2,4;mixed=32"}),
            ("3, eager", 3, {"graph_mode": "none"}),
            (
                "4, breakable", 4,
                {"graph_mode": "breakable", "graph_buckets": "decode=4;mixed=16,64"},
            ),
            (
                "7, two at a time", 7,
                {"graph_mode": "decode=full", "graph_buckets": "decode=1,4", "max_num_seqs": 3},
            ),
        )
        for ahead in (False, True)
    ],
)  # fmt: skip
def test_tokens_are_those_without_drafts(
    model: TinyModel, device: str, plain_answers: list[list[Any]],
    monkeypatch: pytest.MonkeyPatch, tokens: int, options: dict[str, Any], ahead: bool,
) -> None:  # fmt: skip
    """Whatever a request asks for, seeds included."""
    if ahead:
        copied_inputs(monkeypatch)
    llm = drafting(model, device, tokens, **options)
    if ahead:
        llm.engine.pipeline.depth = 2
    for params, right in zip(PARAMS, plain_answers, strict=True):
        for got, expected in zip(answers(llm, params), right, strict=True):
            assert got.token_ids == expected.token_ids
            assert (got.finish_reason, got.stop_reason) == (
                expected.finish_reason, expected.stop_reason,
            )  # fmt: skip
            assert (got.logprobs is None) == (expected.logprobs is None)
            for mine, other in zip(got.logprobs or [], expected.logprobs or [], strict=True):
                assert mine.keys() == other.keys()
                for token, each in mine.items():
                    assert each.rank == other[token].rank
                    assert each.logprob == pytest.approx(other[token].logprob, abs=1e-3)
    counted = metrics(llm)
    assert counted["spec_decode_num_accepted_tokens"] > 50
    assert llm.graph_report().quarantined == []


def test_bad_words_and_stop_strings(device: str) -> None:
    """Several tokens of a step, of which some end a text or complete a word."""
    options: dict[str, Any] = {"device": device, "dtype": "float32", "num_blocks": 129}
    options |= {"max_num_seqs": 4, "max_model_len": 256, "graph_mode": "none"}
    config = {**NGRAM, "num_speculative_tokens": 7}
    plain, llm = LLM(**options), LLM(**options, speculative_config=config)
    prompts = ["Copy: river 42 k river 42 k tree\n", "Once upon a time, there was a cat. The cat"]
    for params in (
        SamplingParams(temperature=0, max_tokens=60, bad_words=["river 42", "the", "was"]),
        SamplingParams(temperature=0, max_tokens=60, stop=["42 k tr", "y"]),
        SamplingParams(temperature=0, max_tokens=60, stop=["ver"], include_stop_str_in_output=True),
        SamplingParams(temperature=0.9, seed=1, max_tokens=50, stop=["ing", "a "], logprobs=1),
    ):
        right = plain.generate(prompts, params, use_tqdm=False)
        for got, expected in zip(llm.generate(prompts, params, use_tqdm=False), right, strict=True):
            mine, other = got.outputs[0], expected.outputs[0]
            assert (mine.text, mine.token_ids) == (other.text, other.token_ids)
            assert (mine.finish_reason, mine.stop_reason) == (
                other.finish_reason, other.stop_reason,
            )  # fmt: skip
            assert len(mine.logprobs or []) == len(other.logprobs or [])
    generated = [each.stats().scheduler.total_generated_tokens for each in (plain, llm)]
    assert generated[0] == generated[1], "what lies behind a stop counts for nothing"


def followers(text: list[int], count: int) -> list[int]:
    """What the n-gram drafter drafts behind a text."""
    for size in (3, 2, 1):
        for end in range(size, len(text)):
            if text[end - size : end] == text[-size:]:
                return text[end : end + count]
    return []


@pytest.mark.parametrize("tokens", [1, 4])
def test_counters_are_those_reckoned_from_the_text(
    model: TinyModel, device: str, tokens: int
) -> None:
    propose = functools.partial(followers, count=tokens)
    check_counters(drafting(model, device, tokens), PROMPTS, propose, accepted=15)


def test_copies_take_few_steps(device: str) -> None:
    """The texts that the demo model copies right without drafts."""
    words = ["river", "cat", "red", "sun", "house", "tree", "moon", "apple", "stone", "bird", "dog"]
    draw = random.Random(1)
    texts = [
        " ".join(
            draw.choice(words) if draw.random() < 0.7 else str(draw.randrange(100))
            for _ in range(draw.randrange(5, 12))
        )
        for _ in range(30)
    ]
    options: dict[str, Any] = {"device": device, "num_blocks": 257, "max_model_len": 256}
    prompts, params = [f"Copy: {each}\n" for each in texts], SamplingParams(temperature=0)
    params.max_tokens = 60
    plain = LLM(**options).generate(prompts, params, use_tqdm=False)
    right = [n for n, each in enumerate(plain) if each.outputs[0].text == texts[n]]
    assert len(right) >= 20
    llm = LLM(
        **options, graph_mode="none", speculative_config={**NGRAM, "num_speculative_tokens": 4}
    )
    tokens = 0
    for number in right:
        (output,) = llm.generate([prompts[number]], params, use_tqdm=False)
        assert output.outputs[0].text == texts[number]
        tokens += len(output.outputs[0].token_ids)
    steps = llm.stats().scheduler.total_steps
    assert tokens / steps >= 2.2, (tokens, steps)


@pytest.mark.parametrize("executor", ["full", "breakable"])
@pytest.mark.parametrize("op", ["paged_attention", "rotary_cache"])
def test_a_fault_that_concerns_drafts_alone_is_caught(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, executor: str, op: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Steps without drafts have one token of a request: there it does nothing."""
    if executor == "breakable" and op == "paged_attention":
        pytest.skip("it runs eagerly there")
    options = {"graph_mode": f"decode={executor},mixed=none", "graph_buckets": "decode=2"}
    with planted(monkeypatch, FAULTS["wrong_drafts"], op), caplog.at_level(logging.CRITICAL):
        plain = make_llm(model, device, **options)
        llm = drafting(model, device, 3, **options)
    assert plain.graph_report().quarantined == []
    (refused,) = llm.graph_report().quarantined
    assert refused.query_len == 4
    assert f"{op} #" in refused.quarantined
    assert model.is_greedy(PROMPTS[1], generate(llm, [PROMPTS[1]], greedy(12))[0])


def test_every_bucket_of_drafted_steps_is_proven(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "VERIFY_SECONDS", 300.0)
    llm = drafting(model, device, 3, graph_mode="full", graph_buckets="decode=1,4,8;mixed=8,32,64")
    for each in llm.graph_report().graphs:
        assert each.verified, each.name
        assert each.query_len == (4 if each.phase == "decode" else 0)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"method": "ngram"}, "num_speculative_tokens=None"),
        ({"method": "ngram", "num_speculative_tokens": 8}, "from 1 to 7"),
        ({"method": "ngram", "num_speculative_tokens": True}, "from 1 to 7"),
        ({"num_speculative_tokens": 3}, "method=None"),
        ({"method": "ngrams", "num_speculative_tokens": 3}, "method='ngrams'"),
        ({"method": "medusa", "num_speculative_tokens": 3}, "method='medusa' is not supported"),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "needs model="),
        ({"model": "a/b", "num_speculative_tokens": 3, "prompt_lookup_max": 3}, "unknown name"),
        ({"model": 3, "num_speculative_tokens": 3}, "model=3 must be text"),
        ({"model": "a", "num_speculative_tokens": 3, "max_model_len": 9}, "max_model_len=9"),
        ({"model": "a", "num_speculative_tokens": 3, "enforce_eager": 1}, "enforce_eager=1"),
        ({"model": "a", "num_speculative_tokens": 3, "draft_sample_method": "best"}, "'best'"),
        ({**NGRAM, "num_speculative_tokens": 3, "prompt_lookup_min": 4}, "prompt_lookup_min=4"),
        ({**NGRAM, "num_speculative_tokens": 3, "prompt_lookup_max": 0}, "prompt_lookup_max=0"),
        ({**NGRAM, "num_speculative_tokens": 3, "prompt_lookup_mix": 2}, "did you mean"),
        ({**NGRAM, "num_speculative_tokens": 3, "synthetic_acceptance": 0.5}, "unknown name"),
        ({**NGRAM, "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}, "draft_"),
        ({"method": "synthetic", "num_speculative_tokens": 3}, "synthetic_acceptance=None"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(device: str, config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match="speculative_config=.*: .*" + told):
        LLM(device=device, speculative_config=config)


def test_vllms_names() -> None:
    for config in (None, {}, {"method": None}):
        assert parse_speculation(config) is None
    found = parse_speculation({"model": "ngram", "num_speculative_tokens": 2})
    assert found is not None
    assert (found.num_tokens, found.width, found.lookup_max, found.lookup_min) == (2, 3, 5, 5)
    one = parse_speculation({**NGRAM, "num_speculative_tokens": 1, "prompt_lookup_max": None})
    assert one is not None
    assert (one.lookup_max, one.lookup_min, one.width) == (1, 1, 1)


def test_room_for_drafts_is_asked_for(model: TinyModel, device: str) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs=8 times 4 tokens"):
        drafting(model, device, 3, max_num_batched_tokens=31)
    drafting(model, device, 3, max_num_batched_tokens=32)


@pytest.mark.parametrize("prompts", [2, 3], ids=["decodes", "beside chunks"])
def test_a_request_that_has_come_to_its_end_proves_nothing(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, prompts: int
) -> None:
    """Where the host runs ahead it is in the step all the same, with length 0. What was proven then
    was that it begins, with a short context, and graphs were trusted with that."""
    monkeypatch.setattr(prove, "VERIFY_SECONDS", 0.0)
    monkeypatch.setattr(prove, "VERIFY_SHARE", 0.0)
    llm = ahead_of_its_tokens(
        model, device, max_num_seqs=2, max_num_batched_tokens=24, graph_mode="full",
        graph_buckets="decode=1,2;mixed=24", graph_verify="canary:1",
        speculative_config={
            "method": "draft_model", "model": str(model.path), "num_speculative_tokens": 3,
        },
    )  # fmt: skip
    graphs = llm.engine.runner.graphs
    seq_lens = llm.engine.runner.buffers.seq_lens.device
    names: list[str] = []
    ended = []
    prove_live = graphs.ledger.prove

    def noted(graph: Any, kind: Any, source: Any) -> None:
        facts = graphs.ledger.facts
        names.extend(facts.name(each) for each in facts.pairs(kind))
        prove_live(graph, kind, source)

    run = graphs.run

    def running(shape: StepShape, *rest: Any) -> Any:
        ended.append(shape.num_requests and not seq_lens[: shape.num_requests].all())
        return run(shape, *rest)

    monkeypatch.setattr(graphs.ledger, "prove", noted)
    monkeypatch.setattr(graphs, "run", running)
    texts = [[7] * 40, random_ids(70, 20), random_ids(71, 60)][:prompts]
    for number, prompt in enumerate(texts):
        llm.engine.add(f"{number}", {"prompt_token_ids": prompt}, greedy(9 + 9 * number))
    while llm.engine.has_work:
        llm.engine.step()
    assert any(ended)
    assert "decodes: alone and context: to 64" in names
    assert "decodes: alone and context: to 16" not in names
    assert "decodes: alone and begins: at the first token" not in names
    assert "requests: several and context: to 16" not in names


@pytest.mark.parametrize("tokens", [1, 3])
def test_no_right_graph_is_refused_for_what_drafts_write_to_the_null_block(
    model: TinyModel, device: str, tokens: int
) -> None:
    """Padding, and drafts beyond the end of a request, write there and nowhere else."""
    options = {"graph_mode": "breakable", "graph_buckets": "decode=1,4;mixed=8"}
    llm = drafting(
        model, device, tokens, **options, max_num_seqs=3, block_size=2, max_model_len=80,
        max_num_batched_tokens=16, num_blocks=129, graph_verify="canary:2",
    )  # fmt: skip
    for params in (greedy(40), greedy(7)):
        generate(llm, PROMPTS, params)
    report = llm.graph_report()
    assert report.canaries > 0
    assert [each.quarantined for each in report.graphs] == [None] * len(report.graphs)


class OtherOrder(PlantedFault):
    """Tokens that have no place write the null block one after another, and in which order is
    nobody's business: on a device it differs from run to run."""

    name = "other_order"
    summary = "the null block is left with what another token wrote"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        for cache in (named["key_cache"], named["value_cache"]):
            cache[0, 0].add_(self.active & (named["slot_mapping"] == 0).any())
        return result


def test_what_has_no_place_may_be_written_in_any_order(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts beyond the last token of a request write where padding does, and attend to that."""
    with planted(monkeypatch, OtherOrder, "rotary_cache"):
        llm = drafting(model, device, 7, graph_mode="full", graph_verify="canary:1")
    for params in (greedy(40), greedy(37, logprobs=3)):
        for got, prompt in zip(answers(llm, params), PROMPTS, strict=True):
            assert model.is_greedy(prompt, got.token_ids)
    assert [each.quarantined for each in llm.graph_report().quarantined] == []

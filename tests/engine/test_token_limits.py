"""``allowed_token_ids`` and ``bad_words``, against transformers' logits processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import (
    TEXT_VOCAB,
    VOCAB,
    TinyModel,
    TinyModels,
    assert_idle,
    calls_of_a_step,
    generate,
    greedy,
    make_llm,
    random_ids,
    text_model,
)
from transformers import NoBadWordsLogitsProcessor

from reprise import LLM, SamplingParams
from reprise.engine.submission import bad_word_tokens
from reprise.errors import RequestError

PROMPT = random_ids(1, 30)
STRANGERS = [random_ids(2, 9), random_ids(3, 60)]
STEPS = 32
SAMPLED: dict[str, Any] = {"temperature": 1.2, "seed": 3, "max_tokens": STEPS}


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return text_model(tiny)


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def letters(llm: LLM) -> list[int]:
    """Tokens that are text on their own, so that their texts are tokenized as they were drawn."""
    texts = {token: llm.get_tokenizer().decode([token]) for token in range(TEXT_VOCAB)}
    return [token for token, text in texts.items() if text.strip().isascii() and text.isalpha()]


@pytest.fixture(scope="module")
def spelled(llm: LLM, letters: list[int]) -> list[int]:
    return one(llm, greedy(STEPS, allowed_token_ids=letters))


def one(llm: LLM, params: SamplingParams) -> list[int]:
    return generate(llm, [PROMPT], params)[0]


def words_in(llm: LLM, output: Sequence[int], size: int) -> list[str]:
    """Texts of ``size`` neighbours in the output whose tokens are these neighbours."""
    tokenizer = llm.get_tokenizer()
    runs = [list(output[n : n + size]) for n in range(len(output) - size + 1)]
    return [
        tokenizer.decode(run)
        for run in runs
        if tokenizer.encode(tokenizer.decode(run), add_special_tokens=False) == run
    ]


def check(llm: LLM, model: TinyModel, output: list[int], params: SamplingParams) -> None:
    """Each token is the likeliest of those that transformers' processor leaves."""
    words = bad_word_tokens(tuple(params.bad_words or ()), llm.get_tokenizer(), TEXT_VOCAB)
    rows = model.logits([*PROMPT, *output])[len(PROMPT) - 1 : -1]
    banned = NoBadWordsLogitsProcessor([list(word) for word in words]) if words else None
    for position, token in enumerate(output):
        row = rows[position]
        if params.allowed_token_ids is not None:
            mask = torch.ones_like(row, dtype=torch.bool)
            mask[list(params.allowed_token_ids)] = False
            row = row.masked_fill(mask, -math.inf)
        if banned is not None:
            # Words are looked for in the output alone, as vLLM does. No word has token 0; without
            # it the processor overlooks words that are as long as all of its input and one more.
            seen = torch.tensor([[0] * 9 + output[:position]], dtype=torch.int64)
            row = banned(seen, row[None])[0]
        assert float(row.max() - row[token]) < 1e-4


@pytest.mark.parametrize("count", [1, 2, 50])
def test_only_allowed_tokens_are_drawn(llm: LLM, model: TinyModel, count: int) -> None:
    allowed = random_ids(7, count, TEXT_VOCAB)
    params = greedy(STEPS, allowed_token_ids=allowed)
    others = [greedy(40), greedy(20, allowed_token_ids=[5, 6, 7], logit_bias={6: 3.0})]
    first, output, last = generate(
        llm, [STRANGERS[0], PROMPT, STRANGERS[1]], [others[0], params, others[1]]
    )
    check(llm, model, output, params)
    assert len(first) == 40
    assert set(last) <= {5, 6, 7}
    assert one(llm, params) == output
    sampled = one(llm, SamplingParams(**SAMPLED, allowed_token_ids=allowed))
    assert set(sampled) <= set(allowed)
    assert count == 1 or len(set(sampled)) > 1


def test_log_probabilities_are_the_models_own(llm: LLM, model: TinyModel) -> None:
    output = llm.generate([PROMPT], greedy(3, allowed_token_ids=[9], logprobs=1))[0].outputs[0]
    expected = model.logprobs([*PROMPT, 9, 9])[len(PROMPT) - 1 :]
    assert output.logprobs is not None
    for entry, row in zip(output.logprobs, expected, strict=True):
        assert entry[9].logprob == pytest.approx(float(row[9]), abs=2e-3)
        assert len(entry) == 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bad_words_are_not_generated(
    llm: LLM, model: TinyModel, letters: list[int], spelled: list[int], size: int
) -> None:
    words = words_in(llm, spelled, size)[:3]
    assert words, "no such word: this output decides nothing"
    params = greedy(STEPS, allowed_token_ids=letters, bad_words=words)
    stranger = greedy(40, bad_words=["a longer one, of many tokens", *words[:1]])
    output = generate(llm, [STRANGERS[0], PROMPT, STRANGERS[1]], [stranger, params, greedy(20)])[1]
    assert output != spelled
    check(llm, model, output, params)
    text = llm.get_tokenizer().decode(output)
    runs = [tuple(output[n : n + size]) for n in range(STEPS)]
    for word in words:
        assert tuple(llm.get_tokenizer().encode(word)) not in runs, text
    sampled = SamplingParams(**SAMPLED, allowed_token_ids=letters[:4], bad_words=words)
    assert one(llm, sampled) == generate(llm, [PROMPT, STRANGERS[0]], [sampled, stranger])[0]


def test_with_and_without_a_leading_space(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    found = bad_word_tokens(("cat", " hat", " "), tokenizer, TEXT_VOCAB)
    texts = ["cat", " cat", "hat", " hat", " ", "  "]
    assert found == tuple(tuple(tokenizer.encode(each)) for each in texts)
    assert bad_word_tokens(("cat", " cat"), tokenizer, TEXT_VOCAB) == found[:2]
    assert bad_word_tokens(("cat",), tokenizer, 5) == ()  # the model has no such tokens


@pytest.mark.parametrize("device_runs_ahead", [False, True])
def test_whatever_else_runs(
    model: TinyModel,
    llm: LLM,
    letters: list[int],
    spelled: list[int],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    device_runs_ahead: bool,
) -> None:
    """Small chunks, preemption, and steps that are scheduled before the last token is known."""
    words = words_in(llm, spelled, 2)[:2] + words_in(llm, spelled, 3)[:2]
    params = [
        greedy(STEPS, allowed_token_ids=letters, bad_words=words),
        SamplingParams(**SAMPLED, allowed_token_ids=letters[:6], bad_words=words),
        SamplingParams(**SAMPLED, bad_words=words, frequency_penalty=0.5),
        greedy(STEPS),
    ]
    prompts = [PROMPT, STRANGERS[0], STRANGERS[1], PROMPT]
    alone = [generate(llm, [each], one)[0] for each, one in zip(prompts, params, strict=True)]
    tight = make_llm(
        model, device, block_size=8, num_blocks=19, max_model_len=128, max_num_seqs=4,
        max_num_batched_tokens=13,
    )  # fmt: skip
    if device_runs_ahead:
        monkeypatch.setattr(tight.engine.pipeline, "depth", 2)
    outputs = tight.generate(prompts, params)
    assert [each.outputs[0].token_ids for each in outputs] == alone
    assert sum(each.metrics.num_preemptions for each in outputs) > 0
    assert_idle(tight)


def test_a_bad_token_is_better_than_one_that_is_not_allowed(llm: LLM, letters: list[int]) -> None:
    token = letters[0]
    text = llm.get_tokenizer().decode([token])
    word = text * 2
    if llm.get_tokenizer().encode(word) != [token, token]:
        pytest.fail("the word is one token: choose another letter")
    for values in ({"temperature": 0}, {"temperature": 1.3, "seed": 1}, {"temperature": 1e-3}):
        params = SamplingParams(max_tokens=8, allowed_token_ids=[token], bad_words=[word], **values)
        assert one(llm, params) == [token] * 8


def test_the_end_is_not_allowed_before_the_minimum(tiny: TinyModels, device: str) -> None:
    llm = make_llm(tiny("qwen3", eos_token_id=3), device)
    params = greedy(STEPS, allowed_token_ids=[3, 8], min_tokens=5, logit_bias={3: 100})
    assert one(llm, params) == [8] * 5 + [3]
    with pytest.raises(RequestError, match=r"allowed_token_ids=\(3,\).*min_tokens=5"):
        one(llm, greedy(8, allowed_token_ids=[3], min_tokens=5))
    assert_idle(llm)


def test_refusals(llm: LLM, letters: list[int]) -> None:
    text = llm.get_tokenizer().decode([letters[0]])
    for values, named in (
        ({"allowed_token_ids": [TEXT_VOCAB]}, "allowed_token_ids has token 340"),
        ({"allowed_token_ids": letters[:1], "bad_words": [text]}, "are all bad_words"),
        ({"bad_words": ["漢" * 200]}, "bad_words has one of [0-9]+ tokens: give at most 256"),
        ({"bad_words": [f"{n:06d}" * 4 for n in range(9000)]}, "bad_words have [0-9]+ tokens"),
    ):
        with pytest.raises(RequestError, match=named):
            one(llm, greedy(4, **values))
    assert_idle(llm)


def test_bad_words_need_a_tokenizer(tiny: TinyModels, device: str) -> None:
    llm = make_llm(tiny("qwen3"), device)
    with pytest.raises(RequestError, match=r"bad_words=\('a',\) needs text"):
        one(llm, greedy(4, bad_words=["a"]))
    assert max(one(llm, greedy(4))) < VOCAB


def test_work_of_a_draw_does_not_grow_with_rows_and_words(llm: LLM) -> None:
    few = SamplingParams(max_tokens=40, allowed_token_ids=[3, 4], bad_words=["a cat"])
    many = SamplingParams(
        max_tokens=40, allowed_token_ids=range(200), bad_words=[f"{n} cats" for n in range(50)]
    )
    counts = {calls_of_a_step(llm, [params] * rows) for params in (few, many) for rows in (1, 4)}
    assert len(counts) == 1

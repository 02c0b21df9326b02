"""Log probabilities, ranks and alternatives against transformers' log-softmax."""

from __future__ import annotations

import pickle
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
    greedy,
    make_llm,
    random_ids,
    text_model,
)
from torch import Tensor

from reprise import LLM, SamplingParams
from reprise.errors import RequestError
from reprise.outputs import Logprobs

PROMPT = random_ids(1, 45)
STRANGERS = [random_ids(2, 9), random_ids(3, 60)]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device)


def check_entry(entry: Logprobs, chosen: int, count: int, expected: Tensor, near: float) -> None:
    """One position's entry against the log-softmax [V] there."""
    order = expected.argsort(descending=True).tolist()
    likeliest = order[:count]
    assert next(iter(entry)) == chosen
    assert set(entry) == {chosen, *likeliest}
    assert [token for token in entry if token in likeliest and token != chosen] == [
        token for token in likeliest if token != chosen
    ]
    for token, value in entry.items():
        assert value.logprob == pytest.approx(float(expected[token]), abs=near)
        assert value.rank == order.index(token) + 1


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_of_the_output(
    llm: LLM, model: TinyModel, tolerance: float, count: int, temperature: float
) -> None:
    """The model's own distribution, whatever changes the draw."""
    params = SamplingParams(
        temperature=temperature,
        seed=1,
        max_tokens=16,
        logprobs=count,
        top_k=30,
        frequency_penalty=0.2,
        logit_bias={7: 3.0},
    )
    strangers = [greedy(9), SamplingParams(max_tokens=20, logprobs=20)]
    output = llm.generate([PROMPT, *STRANGERS], [params, *strangers])[0].outputs[0]
    expected = model.logprobs([*PROMPT, *output.token_ids])[len(PROMPT) - 1 : -1]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == 16
    for entry, token, row in zip(output.logprobs, output.token_ids, expected, strict=True):
        check_entry(entry, token, count, row, tolerance)
    total = sum(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids))  # noqa: B905
    assert output.cumulative_logprob == pytest.approx(total)


def test_none_unless_asked_for(llm: LLM) -> None:
    outputs = llm.generate(
        [PROMPT, *STRANGERS], [greedy(4), greedy(6, logprobs=3), greedy(5, prompt_logprobs=2)]
    )
    first, second, third = (each.outputs[0] for each in outputs)
    assert first.logprobs is None
    assert first.cumulative_logprob is None
    assert second.logprobs is not None
    assert second.cumulative_logprob is not None
    assert third.logprobs is None
    assert [each.prompt_logprobs is not None for each in outputs] == [False, False, True]


def check_prompt(
    found: Sequence[Logprobs | None] | None, prompt: Sequence[int], count: int, expected: Tensor,
    near: float,
) -> None:  # fmt: skip
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    for entry, token, row in zip(found[1:], prompt[1:], expected, strict=False):
        assert entry is not None
        check_entry(entry, token, count, row, near)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="at once"),
        pytest.param({"max_num_seqs": 1, "max_num_batched_tokens": 1}, id="chunks of 1"),
        pytest.param({"max_num_seqs": 4, "max_num_batched_tokens": 7}, id="chunks of 7"),
        pytest.param({"block_size": 8, "num_blocks": 15, "max_model_len": 96}, id="preempted"),
    ],
)
def test_of_the_prompt(
    model: TinyModel, device: str, tolerance: float, options: dict[str, Any]
) -> None:
    llm = make_llm(model, device, **options)
    prompts = [PROMPT, *STRANGERS, [5]]
    counts = [2, 0, 4, 1]
    params = [greedy(40, prompt_logprobs=count) for count in counts]
    llm.generate(prompts, greedy(20))  # now the prefix cache knows them
    outputs = llm.generate(prompts, params)
    if "num_blocks" in options:
        assert sum(each.metrics.num_preemptions for each in outputs) > 0
    for output, prompt, count in zip(outputs, prompts, counts, strict=True):
        expected = model.logprobs(prompt)
        check_prompt(output.prompt_logprobs, prompt, count, expected, tolerance)
        assert model.is_greedy(prompt, output.outputs[0].token_ids)
    assert_idle(llm)


def test_of_the_prompt_beside_requests_from_the_prefix_cache(
    llm: LLM, model: TinyModel, tolerance: float
) -> None:
    """They compute all of it; neighbours with the same prompt still share its blocks."""
    params = [greedy(4), greedy(4, prompt_logprobs=1, n=2), greedy(4)]
    llm.generate([PROMPT] * 3, params)
    outputs = llm.generate([PROMPT] * 3, params)
    cached = [each.metrics.num_cached_tokens for each in outputs]
    assert cached == [(len(PROMPT) - 1) // 16 * 16, 0, (len(PROMPT) - 1) // 16 * 16]
    check_prompt(outputs[1].prompt_logprobs, PROMPT, 1, model.logprobs(PROMPT), tolerance)


def test_of_a_long_prompt(tiny: TinyModels, device: str, tolerance: float) -> None:
    """More positions in a step than logits that are computed at once."""
    model = tiny("llama", max_position_embeddings=600)
    prompt = random_ids(8, 530)
    llm = make_llm(model, device, max_num_batched_tokens=600)
    output = llm.generate([prompt], greedy(2, prompt_logprobs=1))[0]
    check_prompt(output.prompt_logprobs, prompt, 1, model.logprobs(prompt), tolerance)


def test_ties_share_a_rank(tmp_path: Any, device: str) -> None:
    """A model that finds all tokens equally likely."""
    from helpers import random_model

    model = random_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    output = make_llm(TinyModel(tmp_path), device).generate([PROMPT], greedy(2, logprobs=3))[0]
    assert output.outputs[0].logprobs is not None
    for entry in output.outputs[0].logprobs:
        assert len(entry) in (3, 4)
        for value in entry.values():
            assert value.logprob == pytest.approx(-float(torch.tensor(VOCAB).log()), abs=1e-5)


def test_tokens_have_text(tiny: TinyModels, device: str) -> None:
    llm = make_llm(text_model(tiny), device)
    tokenizer = llm.get_tokenizer()
    output = llm.generate(["Once upon a time"], greedy(6, logprobs=2, prompt_logprobs=1))[0]
    entries = [*(output.outputs[0].logprobs or []), *(output.prompt_logprobs or [])[1:]]
    assert len(entries) == 6 + len(output.prompt_token_ids) - 1
    for entry in entries:
        assert entry is not None
        for token, value in entry.items():
            assert 0 <= token < TEXT_VOCAB
            assert value.decoded_token == tokenizer.decode([token])


def test_of_the_whole_vocabulary(llm: LLM, model: TinyModel, tolerance: float) -> None:
    """Beside requests that want few or none, which get no more than they asked for."""
    params = [
        greedy(6, logprobs=-1),
        greedy(6, logprobs=2),
        greedy(6),
        SamplingParams(max_tokens=4, seed=1, logprobs=-1, prompt_logprobs=-1),
    ]
    prompts = [PROMPT, *STRANGERS, PROMPT]
    outputs = llm.generate(prompts, params)
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        found = output.outputs[0]
        if each.logprobs is None:
            assert found.logprobs is None
            continue
        assert found.logprobs is not None
        count = VOCAB if each.logprobs == -1 else each.logprobs
        rows = model.logprobs([*prompt, *found.token_ids])[len(prompt) - 1 : -1]
        for entry, token, row in zip(found.logprobs, found.token_ids, rows, strict=True):
            check_entry(entry, token, count, row, tolerance)
    check_prompt(outputs[3].prompt_logprobs, PROMPT, VOCAB, model.logprobs(PROMPT), tolerance)
    assert [each.prompt_logprobs for each in outputs[:3]] == [None] * 3
    assert_idle(llm)


def test_a_whole_vocabulary_reads_like_a_dictionary(tiny: TinyModels, device: str) -> None:
    llm = make_llm(text_model(tiny), device)
    tokenizer = llm.get_tokenizer()
    few, whole = (
        llm.generate(["Once upon a time"], greedy(1, logprobs=count))[0].outputs[0].logprobs[0]
        for count in (20, -1)
    )
    assert list(whole)[:20] == list(few)
    assert {token: whole[token] for token in few} == few
    assert len(whole) == len(dict(whole)) == TEXT_VOCAB
    assert sum(torch.tensor(each.logprob).exp() for each in whole.values()) == pytest.approx(1)
    assert all(each.decoded_token == tokenizer.decode([token]) for token, each in whole.items())
    for unknown in (-1, TEXT_VOCAB):
        with pytest.raises(KeyError):
            whole[unknown]
    assert TEXT_VOCAB not in whole
    assert pickle.loads(pickle.dumps(whole)) == dict(whole)


@pytest.mark.parametrize(
    ("limit", "fine", "refused"),
    [(None, (20, -1), (21,)), (5, (5,), (6, -1)), (-1, (21, VOCAB, -1), ()), (VOCAB, (-1,), ())],
)
def test_the_engines_limit(
    model: TinyModel, device: str, limit: int | None, fine: tuple[int], refused: tuple[int]
) -> None:
    llm = make_llm(model, device, max_logprobs=limit)
    for count in fine:
        output = llm.generate([PROMPT], greedy(1, logprobs=count, prompt_logprobs=count))[0]
        assert output.outputs[0].logprobs is not None
        assert len(output.outputs[0].logprobs[0]) == (VOCAB if count == -1 else count)
    for name in ("logprobs", "prompt_logprobs"):
        for count in refused:
            with pytest.raises(RequestError, match=f"{name}={count}: give at most"):
                llm.generate([PROMPT], greedy(1, **{name: count}))


def test_tokens_have_no_text_without_detokenizing(tiny: TinyModels, device: str) -> None:
    llm = make_llm(text_model(tiny), device)
    for count in (1, -1):
        params = greedy(3, logprobs=count, prompt_logprobs=count, detokenize=False)
        output = llm.generate(["Once upon a time"], params)[0]
        entries = [*(output.outputs[0].logprobs or []), *(output.prompt_logprobs or [])[1:]]
        assert entries
        for entry in entries:
            assert {each.decoded_token for each in entry.values()} == {None}

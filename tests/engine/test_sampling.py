"""How tokens are chosen and when a request stops, against transformers' logits processors."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers import (
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
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reprise import LLM, SamplingParams

PROMPT = random_ids(1, 30)
STRANGERS = [random_ids(2, 9), random_ids(3, 60)]
STEPS = 32


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def best(llm: LLM) -> list[int]:
    """The greedy output."""
    return generate(llm, [PROMPT], greedy(STEPS))[0]


def one(llm: LLM, params: SamplingParams) -> list[int]:
    return generate(llm, [PROMPT], params)[0]


def adjusted(logits: Tensor, output: Sequence[int], params: SamplingParams) -> Tensor:
    """The formulas, on one row of logits [V]."""
    row = logits.clone()
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    if params.repetition_penalty != 1:
        seen = torch.tensor([[*PROMPT, *output]])
        row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, row[None])[0]
    for token, count in Counter(output).items():
        row[token] -= count * params.frequency_penalty + params.presence_penalty
    return row


# ---- greedy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 1e-6},
        {"temperature": 1e-3},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 0, "top_k": 40, "top_p": 0.5, "min_p": 0.1, "seed": 9},
    ],
)
def test_ways_to_be_greedy(
    llm: LLM, model: TinyModel, best: list[int], values: dict[str, Any]
) -> None:
    assert model.is_greedy(PROMPT, best)
    assert one(llm, SamplingParams(max_tokens=STEPS, **values)) == best


# ---- penalties and bias ------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 2.0},
        {"presence_penalty": -1.5},
        {"frequency_penalty": 1.0},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 4.0, 100: -7.5, 159: 2.0}},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {5: 2.5},
        },
    ],
)
def test_penalties_follow_their_formulas(
    llm: LLM, model: TinyModel, best: list[int], values: dict[str, Any]
) -> None:
    params = greedy(STEPS, **values)
    # Neighbours with other penalties, and none, in the same steps.
    others = [greedy(40), greedy(20, repetition_penalty=3.0)]
    output = generate(llm, [STRANGERS[0], PROMPT, STRANGERS[1]], [others[0], params, others[1]])[1]
    assert output != best
    rows = model.logits([*PROMPT, *output])[len(PROMPT) - 1 : -1]
    for position, token in enumerate(output):
        row = adjusted(rows[position], output[:position], params)
        assert float(row.max() - row[token]) < 1e-4
    assert one(llm, params) == output


def test_bias_forces_and_bans(llm: LLM, best: list[int]) -> None:
    assert one(llm, greedy(8, logit_bias={11: 100})) == [11] * 8
    assert one(llm, SamplingParams(max_tokens=8, seed=1, logit_bias={11: 100})) == [11] * 8
    banned = dict.fromkeys(best, -100.0)
    assert not set(one(llm, greedy(STEPS, logit_bias=banned))) & set(best)
    sampled = SamplingParams(temperature=1.5, seed=2, max_tokens=64, logit_bias=banned)
    assert not set(one(llm, sampled)) & set(best)
    assert one(llm, greedy(STEPS, logit_bias={})) == best


# ---- the draw ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 10_000, "top_p": 0.8},
        {"top_p": 0.5, "temperature": 0.5, "frequency_penalty": 0.5, "logit_bias": {9: 2.0}},
    ],
)
def test_only_kept_tokens_are_drawn(llm: LLM, model: TinyModel, values: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.3, "seed": 5, "max_tokens": 120, **values})
    output = one(llm, params)
    rows = model.logits([*PROMPT, *output])[len(PROMPT) - 1 : -1]
    warpers: list[Any] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    warpers += [TopPLogitsWarper(params.top_p), MinPLogitsWarper(params.min_p)]
    choices = set()
    for position, token in enumerate(output):
        row = adjusted(rows[position], output[:position], params)[None]
        for warper in warpers:
            row = warper(torch.tensor([PROMPT]), row)
        assert math.isfinite(float(row[0, token]))
        choices.add((row[0] > row[0, token]).sum().item())
    assert len(choices) > 1, "always the likeliest token: nothing was drawn"


def test_draws_follow_the_distribution(model: TinyModel, device: str) -> None:
    """Pearson's chi-squared over the first token of many completions."""
    count = 3000
    llm = make_llm(model, device, max_num_seqs=256, num_blocks=1025)
    params = SamplingParams(temperature=2.5, seed=0, max_tokens=1, n=count)
    output = llm.generate([PROMPT[:4]], params)[0]
    drawn = Counter(each.token_ids[0] for each in output.outputs)
    expected = count * (model.logits(PROMPT[:4])[-1] / 2.5).softmax(dim=-1)
    often = [token for token in range(VOCAB) if float(expected[token]) >= 5]
    assert len(often) > 20
    cells = [(drawn[token], float(expected[token])) for token in often]
    cells.append((count - sum(n for n, _ in cells), count - sum(e for _, e in cells)))
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = len(cells) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
    assert_idle(llm)


def test_a_seed_decides_whatever_else_runs(model: TinyModel, llm: LLM, device: str) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=42, max_tokens=STEPS)
    expected = one(llm, params)
    assert one(llm, params) == expected
    other = SamplingParams(temperature=1.0, top_p=0.95, seed=43, max_tokens=STEPS)
    assert one(llm, other) != expected
    hot = SamplingParams(temperature=3.0, seed=42, max_tokens=45)
    prompts = [STRANGERS[0], PROMPT, STRANGERS[1], PROMPT]
    crowd = generate(llm, prompts, [hot, params, greedy(50), other])
    assert crowd[1] == expected
    assert generate(llm, prompts[::-1], [params, greedy(50), other, hot])[0] == expected
    chunked = make_llm(model, device, max_num_seqs=3, max_num_batched_tokens=5, block_size=8)
    assert generate(chunked, prompts, [hot, params, greedy(50), other])[1] == expected


def test_equal_seeds_of_equal_prompts_agree(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=42, max_tokens=STEPS)
    first, second = generate(llm, [PROMPT, PROMPT], params)
    assert first == second


@pytest.mark.parametrize("seed", [0, -(2**63), 2**63 - 1])
def test_any_seed_draws(llm: LLM, seed: int) -> None:
    output = one(llm, SamplingParams(temperature=1.5, seed=seed, max_tokens=STEPS))
    assert len(set(output)) > 5


# ---- the end -----------------------------------------------------------------------------


def ending_model(tiny: TinyModels, best: list[int], position: int) -> TinyModel:
    """The same model, which ends its text with the token at ``position`` of its greedy output."""
    return tiny("qwen3", eos_token_id=best[position])


def first_use(best: list[int], after: int) -> int:
    """The first position behind ``after`` with a token that was not used before."""
    return next(i for i in range(after, len(best)) if best[i] not in best[:i])


def test_end_of_text(tiny: TinyModels, device: str, best: list[int]) -> None:
    end = first_use(best, 6)
    llm = make_llm(ending_model(tiny, best, end), device)
    output = llm.generate([PROMPT], greedy(STEPS))[0].outputs[0]
    assert output.token_ids == best[: end + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    ignoring = llm.generate([PROMPT], greedy(STEPS, ignore_eos=True))[0].outputs[0]
    assert ignoring.token_ids == best
    assert (ignoring.finish_reason, ignoring.stop_reason) == ("length", None)


@pytest.mark.parametrize("minimum", [0, 6, 7, 12, STEPS])
def test_end_of_text_not_before_the_minimum(
    tiny: TinyModels, device: str, best: list[int], model: TinyModel, minimum: int
) -> None:
    """Until then its logit is taken away."""
    end = first_use(best, 6)
    eos = best[end]
    llm = make_llm(ending_model(tiny, best, end), device)
    # Beside a request that may end at once.
    output, free = generate(
        llm, [PROMPT, PROMPT], [greedy(STEPS, min_tokens=minimum), greedy(STEPS)]
    )
    assert free == best[: end + 1]
    assert eos not in output[:minimum]
    assert len(output) >= minimum
    rows = model.logits([*PROMPT, *output])[len(PROMPT) - 1 : -1]
    rows[:minimum, eos] = -math.inf
    assert rows.argmax(dim=-1).tolist() == output
    assert output[-1] == eos or len(output) == STEPS


def test_stop_tokens(llm: LLM, best: list[int]) -> None:
    early, late = first_use(best, 5), first_use(best, 12)
    params = greedy(STEPS, stop_token_ids=[best[late], best[early]])
    output = llm.generate([PROMPT], params)[0].outputs[0]
    assert output.token_ids == best[: early + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", best[early])
    minimum = greedy(STEPS, stop_token_ids=[best[early]], min_tokens=early + 1)
    output = llm.generate([PROMPT], minimum)[0].outputs[0]
    assert output.token_ids[:early] == best[:early]
    assert output.token_ids[early] != best[early]


@pytest.mark.parametrize("count", [1, 2, STEPS])
def test_length(llm: LLM, best: list[int], count: int) -> None:
    output = llm.generate([PROMPT], greedy(count))[0].outputs[0]
    assert output.token_ids == best[:count]
    assert output.finish_reason == "length"


def test_the_context_ends_a_request(model: TinyModel, device: str, best: list[int]) -> None:
    llm = make_llm(model, device, max_model_len=48)
    for limit in (None, 1000):
        result = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=limit))[0]
        output = result.outputs[0]
        assert output.token_ids == best[: 48 - len(PROMPT)]
        assert output.finish_reason == "length"
    longest = llm.generate([random_ids(4, 47)], greedy(5))[0].outputs[0]
    assert len(longest.token_ids) == 1


# ---- stop strings ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(tiny: TinyModels, device: str) -> LLM:
    return make_llm(text_model(tiny), device)


def written(llm: LLM, params: SamplingParams) -> Any:
    output = llm.generate(["Once upon a time"], params)[0].outputs[0]
    assert_idle(llm)
    return output


@pytest.fixture(scope="module")
def story(writer: LLM) -> list[int]:
    return list(written(writer, greedy(STEPS)).token_ids)


def spans(llm: LLM, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of tokens and its length after each of them."""
    decode = llm.get_tokenizer().decode
    texts = [decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
    return texts[-1], [len(text.rstrip("\ufffd")) for text in texts]


def test_stop_strings_wherever_they_fall(writer: LLM, story: list[int]) -> None:
    text, lengths = spans(writer, story)
    num_crossing = 0
    for begin, size in product(range(len(text)), (1, 2, 3)):
        stop, end = text[begin : begin + size], begin + size
        if "\ufffd" in stop or text.find(stop) != begin or end > len(text):
            continue
        crossing = any(begin < n < end for n in lengths)
        if not crossing and begin % 4:
            continue
        num_crossing += crossing
        last = next(i for i, n in enumerate(lengths) if n >= end)
        include = bool(begin % 2)
        params = greedy(STEPS, stop=[stop], include_stop_str_in_output=include)
        output = written(writer, params)
        assert output.text == text[: end if include else begin]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == story[: last + 1]
    assert num_crossing > 3


def test_the_first_stop_string_wins(writer: LLM, story: list[int]) -> None:
    text, _ = spans(writer, story)
    valid = [i for i in range(3, len(text)) if text.find(text[i]) == i and text[i] != "\ufffd"]
    early, late = valid[0], valid[-1]
    output = written(writer, greedy(STEPS, stop=[text[late], "never", text[early]]))
    assert (output.text, output.stop_reason) == (text[:early], text[early])


def test_no_stop_string(writer: LLM, story: list[int]) -> None:
    output = written(writer, greedy(STEPS, stop=["certainly not in it"]))
    assert output.token_ids == story
    assert output.text == spans(writer, story)[0].rstrip("\ufffd")
    assert (output.finish_reason, output.stop_reason) == ("length", None)


def test_without_text(writer: LLM, story: list[int]) -> None:
    output = written(writer, greedy(STEPS, detokenize=False))
    assert (output.text, output.token_ids) == ("", story)


def test_special_tokens_in_the_text(writer: LLM) -> None:
    forced = {1: 100.0}  # <user>
    assert written(writer, greedy(3, logit_bias=forced)).text == ""
    shown = written(writer, greedy(3, logit_bias=forced, skip_special_tokens=False))
    assert shown.text == "<user><user><user>"


def test_the_token_that_ends_is_no_text(tiny: TinyModels, device: str, story: list[int]) -> None:
    llm = make_llm(text_model(tiny, eos_token_id=story[4]), device)
    expected, _ = spans(llm, story[: story.index(story[4])])
    output = written(llm, greedy(STEPS))
    assert output.token_ids == story[: story.index(story[4]) + 1]
    assert output.text == expected


def test_work_of_a_draw_does_not_grow_with_the_rows(llm: LLM) -> None:
    asked = {"logit_bias": {3: 1.0}, "repetition_penalty": 1.1, "min_tokens": 30}
    params = SamplingParams(max_tokens=40, stop_token_ids=[5], logprobs=2, **asked)
    assert calls_of_a_step(llm, [params]) == calls_of_a_step(llm, [params] * 4) > 0
    assert_idle(llm)


def test_top_k_above_any_vocabulary_keeps_all(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, seed=3, temperature=0.9)
    assert one(llm, replace(params, top_k=2**40)) == one(llm, params)


def test_an_end_of_sequence_token_that_is_no_token_is_dropped(
    tiny: TinyModels, device: str, best: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        llm = make_llm(tiny("qwen3", eos_token_id=[best[9], VOCAB + 40]), device)
    assert str([VOCAB + 40]) in caplog.text
    first = best.index(best[9])
    assert one(llm, greedy(STEPS)) == best[: first + 1]
    assert len(one(llm, greedy(STEPS, min_tokens=STEPS))) == STEPS

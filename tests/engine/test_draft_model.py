"""A model that drafts changes how many tokens come of a step, and no token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting import check_counters, metrics
from helpers import (
    TinyModel,
    TinyModels,
    make_llm,
)
from planted import OPTIONS, make_oracle, serve
from test_drafts import PARAMS, PROMPTS, answers

from reprise import LLM
from reprise.runner import model_runner

PLAIN = [params for params in PARAMS if not params.min_tokens and params.logit_bias is None
         and not (params.frequency_penalty or params.presence_penalty)]  # fmt: skip
"""What a draft model draws from as the target does."""


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def near(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One that is often right: the target with other weights by a little."""
    path = tmp_path_factory.mktemp("near")
    other = TinyModel(model.path).reference
    generator = torch.Generator().manual_seed(0)
    for each in other.parameters():
        each.mul_(1 + 0.03 * torch.randn(each.shape, generator=generator))
    other.save_pretrained(path)
    return TinyModel(path)


@pytest.fixture(scope="module")
def other(tiny: TinyModels) -> TinyModel:
    """Of another architecture and other sizes."""
    return tiny("llama", seed=4, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1)


def drafting(model: TinyModel, draft: TinyModel | Path, device: str, k: int, **options: Any) -> LLM:
    path = draft.path if isinstance(draft, TinyModel) else draft
    config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": k}
    config |= options.pop("draft", {})
    return make_llm(model, device, speculative_config=config, **options)


def rate(llm: LLM) -> float:
    """Of the drafted tokens, how many counted."""
    found = metrics(llm)
    return found["spec_decode_num_accepted_tokens"] / found["spec_decode_num_draft_tokens"]


@pytest.fixture(scope="module")
def plain_answers(model: TinyModel, device: str) -> list[list[Any]]:
    plain = make_llm(model, device)
    return [answers(plain, params) for params in PARAMS]


EXECUTORS: dict[str, dict[str, Any]] = {
    "eager": {"graph_mode": "none"},
    "full": {"graph_mode": "full", "graph_buckets": "decode=2,4;mixed=32"},
    "breakable": {"graph_mode": "breakable", "graph_buckets": "decode=4;mixed=16,64"},
    "two at a time": {
        "graph_mode": "decode=full",
        "graph_buckets": "decode=1,4",
        "max_num_seqs": 3,
    },
}


@pytest.mark.parametrize(
    ("k", "which", "ahead"),
    [
        pytest.param(
            k, which, ahead, id=f"{which}, {k}{', ahead' * ahead}",
            marks=[pytest.mark.long] * (number not in (1, 2)),
        )
        for number, (k, which, ahead) in enumerate(
            (k, which, ahead)
            for k, which in ((1, "full"), (3, "eager"), (4, "breakable"), (7, "two at a time"))
            for ahead in (False, True)
        )
    ],
)  # fmt: skip
def test_tokens_are_those_without_drafts(
    model: TinyModel, near: TinyModel, device: str, plain_answers: list[list[Any]],
    monkeypatch: pytest.MonkeyPatch, k: int, which: str, ahead: bool,
) -> None:  # fmt: skip
    """Whatever a request asks for, seeds included."""
    if ahead:
        buffers = functools.partial(model_runner.StepBuffers, shared=False)
        monkeypatch.setattr(model_runner, "StepBuffers", buffers)
    llm = drafting(model, near, device, k, **EXECUTORS[which])
    if ahead:
        llm.engine._depth = 2
    for params, right in zip(PARAMS, plain_answers, strict=True):
        for got, expected in zip(answers(llm, params), right, strict=True):
            assert got.token_ids == expected.token_ids
            assert (got.finish_reason, got.stop_reason) == (
                expected.finish_reason, expected.stop_reason,
            )  # fmt: skip
    assert 0.1 < rate(llm) < 0.9
    report = llm.graph_report()
    assert report.quarantined == []
    owners = {each.owner for each in report.graphs}
    assert owners == (set() if which == "eager" else {"", "draft prefill", "draft chain"})


@pytest.mark.parametrize("which", ["eager", pytest.param("full", marks=pytest.mark.long)])
def test_the_target_as_its_own_draft_is_always_right(
    model: TinyModel, device: str, which: str
) -> None:
    """Greedy and with seeds, since it draws with the same number; behind chunks, prefix hits,
    requests that are computed again, and beside others that do anything of it."""
    llm = drafting(model, model, device, 4, **{**OPTIONS, **EXECUTORS[which]})
    for params in PLAIN:
        answers(llm, params)
        assert rate(llm) == 1
    serve(llm)
    assert llm.stats().scheduler.total_preemptions > 0
    assert llm.stats().scheduler.total_prefix_hits > 0
    assert rate(llm) == 1


@pytest.mark.parametrize("k", [1, 4])
def test_counters_are_those_of_the_draft_model(
    model: TinyModel, near: TinyModel, device: str, k: int
) -> None:
    """Exactly those that transformers' model would have."""

    def propose(text: list[int]) -> list[int]:
        found = list(text)
        for _ in range(k):
            found.append(int(near.logits(found)[-1].argmax()))
        return found[len(text) :]

    check_counters(drafting(model, near, device, k), PROMPTS[:3], propose, accepted=15)


def test_any_draft_model_of_the_same_tokens_does(
    model: TinyModel, other: TinyModel, device: str
) -> None:
    """Other layers, heads and sizes; chunks, prefix hits, preemption."""
    right = make_oracle(model, device)()
    llm = drafting(model, other, device, 3, **{**OPTIONS, "graph_mode": "none"})
    assert serve(llm) == right
    assert 0 < rate(llm) < 0.3

"""Logits that are no numbers: their request ends with a typed error, and harms no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    greedy,
    make_llm,
    random_ids,
    random_model,
    rewritten_logits,
)
from torch import Tensor

from reprise import LLM, AsyncLLM, RequestOutput, SamplingParams
from reprise.errors import NonFiniteError
from reprise.graphs.segments import SegmentedGraph

PROMPTS = [random_ids(1, 40), random_ids(2, 9), random_ids(3, 21)]
OVERFLOWING = 77
"""A token that overflows in :func:`overflowing`."""


def _all_nan(row: Tensor) -> Tensor:
    return torch.full_like(row, torch.nan)


def _set(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(row: Tensor) -> Tensor:
        row = row.clone()
        row[place] = value
        return row

    return change


ODD = {
    "all NaN": _all_nan,
    "one NaN": _set(3, torch.nan),
    "one infinity": _set(159, torch.inf),
    "nothing can be drawn": lambda row: torch.full_like(row, -torch.inf),
}
KINDS = {
    "greedy": greedy(8),
    "drawn": SamplingParams(temperature=0.9, seed=5, max_tokens=8),
    "adjusted": greedy(8, logprobs=2, repetition_penalty=1.2, logit_bias={3: 4.0, 159: -9.0}),
}


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def llm(model: TinyModel, device: str) -> LLM:
    return make_llm(model, device)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(each.outputs[0].token_ids) for each in outputs]


def served(llm: LLM, params: Any, prompts: list[list[int]] = PROMPTS) -> list[RequestOutput]:
    llm.reset_prefix_cache()
    return llm.generate([{"prompt_token_ids": each} for each in prompts], params, use_tqdm=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("at", [0, 4])
def test_one_of_three(llm: LLM, kind: str, odd: str, at: int) -> None:
    expected = tokens(served(llm, KINDS[kind]))
    victim, drawn = f"{int(served(llm, greedy(1))[-1].request_id) + 2}", 0

    def rewrite(request_id: str, row: Tensor) -> Tensor:
        nonlocal drawn
        if request_id != victim:
            return row
        drawn += 1
        return ODD[odd](row) if drawn == at + 1 else row

    with rewritten_logits(llm, rewrite), pytest.raises(NonFiniteError) as caught:
        served(llm, KINDS[kind])
    assert f"output token {at} of request {victim!r}" in str(caught.value)
    assert str(caught.value).startswith("1 of 3 requests")
    outputs = caught.value.outputs
    assert [each.outputs[0].finish_reason for each in outputs] == ["length", "error", "length"]
    assert tokens(outputs) == [expected[0], expected[1][:at], expected[2]]
    assert_idle(llm)
    assert tokens(served(llm, KINDS[kind])) == expected


def test_a_token_that_cannot_be_drawn_is_no_fault(llm: LLM) -> None:
    """Models may rule tokens out."""
    with rewritten_logits(llm, lambda _, row: _set(3, -torch.inf)(row)):
        assert all(len(each) == 8 for each in tokens(served(llm, greedy(8))))


def test_all_completions_of_the_request_end(llm: LLM) -> None:
    first = int(served(llm, greedy(1))[-1].request_id) + 1

    def rewrite(request_id: str, row: Tensor) -> Tensor:
        return _all_nan(row) if request_id == f"{first}#1" else row

    params = SamplingParams(temperature=1, n=3, seed=1, max_tokens=6)
    with rewritten_logits(llm, rewrite), pytest.raises(NonFiniteError) as caught:
        served(llm, [params, greedy(4), greedy(4)])
    assert [[each.finish_reason for each in output.outputs] for output in caught.value.outputs] == [
        ["abort", "error", "abort"], ["length"], ["length"],
    ]  # fmt: skip
    assert_idle(llm)


def test_metrics_count_it(llm: LLM) -> None:
    def failed() -> list[Any]:
        return [
            each.value  # type: ignore[union-attr]
            for each in llm.get_metrics()
            if each.name == "reprise:corrupted_requests"
            or each.labels.get("finished_reason") == "error"
        ]

    before = failed()
    with rewritten_logits(llm, lambda _, row: _all_nan(row)), pytest.raises(NonFiniteError):
        served(llm, greedy(4))
    assert failed() == [each + 3 for each in before]


def test_a_stream_ends_with_the_error(model: TinyModel, device: str) -> None:
    async def read(llm: AsyncLLM, name: str) -> list[int]:
        found = [each async for each in llm.generate(PROMPTS[0], greedy(8), name)]
        return list(found[-1].outputs[0].token_ids)

    async def main() -> None:
        options: dict[str, Any] = {
            "device": device, "dtype": "float32", "skip_tokenizer_init": True, "num_blocks": 33,
        }  # fmt: skip
        async with AsyncLLM(str(model.path), **options) as llm:
            expected = await read(llm, "alone")

            def rewrite(request_id: str, row: Tensor) -> Tensor:
                return _all_nan(row) if request_id == "bad" else row

            with rewritten_logits(llm, rewrite):  # type: ignore[arg-type]
                found = await asyncio.gather(
                    read(llm, "good"), read(llm, "bad"), return_exceptions=True
                )
            assert found[0] == expected
            assert isinstance(found[1], NonFiniteError)
            assert await read(llm, "bad") == expected

    asyncio.run(main())


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of finite weights, in which one token leads beyond the largest number: nothing
    but its embedding reaches a feature that is multiplied by as much."""
    path: Path = tmp_path_factory.mktemp("overflowing")
    found = random_model("llama")
    weights = dict(found.named_parameters())
    weights["model.embed_tokens.weight"][:, 0] = 0
    weights["model.embed_tokens.weight"][OVERFLOWING, 0] = 8.0
    for name, each in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            each[0] = 0
        if name.endswith("v_proj.weight"):
            each[:, 0] = 1e38
    found.save_pretrained(path)
    return path


@pytest.mark.parametrize("graph_mode", ["none", "full"])
def test_a_prompt_that_overflows(overflowing: Path, device: str, graph_mode: str) -> None:
    """What it leaves in the cache is neither found nor read by anybody, and no graph is accused."""
    options: dict[str, Any] = {"graph_mode": graph_mode, "num_blocks": 12}
    if graph_mode == "full":
        options |= {"graph_buckets": "decode=1,4;mixed=64", "graph_verify": "canary:1"}
    llm = make_llm(overflowing, device, **options)
    sound, *good = (
        [each for each in random_ids(seed, 40) if each != OVERFLOWING] for seed in (4, 6, 7)
    )
    bad = [*sound, OVERFLOWING, *random_ids(5, 30)]
    expected = tokens(served(llm, greedy(6), good))
    for _ in range(2):
        with pytest.raises(NonFiniteError) as caught:
            served(llm, greedy(6), [good[0], bad, good[1]])
        assert tokens(caught.value.outputs) == [expected[0], [], expected[1]]
        assert_idle(llm)
        # In the blocks that it had.
        assert tokens(served(llm, greedy(6), good)) == expected
    with pytest.raises(NonFiniteError):
        llm.generate({"prompt_token_ids": bad}, greedy(6), use_tqdm=False)
    with pytest.raises(NonFiniteError) as caught:
        llm.generate({"prompt_token_ids": bad}, greedy(6), use_tqdm=False)
    assert caught.value.outputs[0].num_cached_tokens == 0
    report = llm.graph_report()
    assert report.quarantined == []
    assert report.canary_failures == 0


@pytest.mark.parametrize("seen", [False, True])
def test_a_graph_that_nothing_was_compared_with_is_named(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    """What it gave need not be what the model says; of a replay that is compared the eager result
    is what leaves."""
    llm = make_llm(
        model, device, max_num_seqs=4, graph_mode="decode=full,mixed=none",
        graph_buckets="decode=1", graph_verify="canary:1" if seen else "startup",
    )  # fmt: skip
    forward_pass, graphs = llm.engine.runner.forward_pass, llm.engine.runner.graphs
    monkeypatch.setattr(graphs.ledger, "trusts", lambda *asked: True)
    replay = SegmentedGraph.replay

    def overflow(self: SegmentedGraph) -> None:
        replay(self)
        forward_pass._logits.fill_(torch.nan)

    monkeypatch.setattr(SegmentedGraph, "replay", overflow)
    prompts = [PROMPTS[0]]
    if seen:
        assert tokens(served(llm, greedy(6), prompts)) == tokens(
            served(make_llm(model, device), greedy(6), prompts)
        )
    else:
        with pytest.raises(NonFiniteError, match=r"or graph decode\[1\] is wrong"):
            served(llm, greedy(6), prompts)

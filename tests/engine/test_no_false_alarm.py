"""Graphs that are right are not refused, whatever the engine is made of and what is done to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids, random_model
from planted import OPTIONS, Oracle, make_oracle, serve

from reprise import LLM
from reprise.errors import NonFiniteError
from reprise.runner import PendingOutput


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def oracle(model: TinyModel, device: str) -> Oracle:
    return make_oracle(model, device)


def watched(model: Any, device: str, **options: Any) -> LLM:
    return make_llm(
        model, device, **{**OPTIONS, "graph_mode": "full", "graph_verify": "canary:1", **options}
    )


def assert_no_alarm(llm: LLM, *, verified: bool = True) -> None:
    report = llm.graph_report()
    assert [each.quarantined for each in report.quarantined] == []
    assert report.canary_failures == 0
    assert report.replays == report.canaries > 0
    assert all(each.verified for each in report.graphs) == verified


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("block_size", "num_blocks"),
    [
        (1, 3), (1, 5), (1, 40), (2, 4), (4, 5), (8, 3), (16, 4), (16, 5), (64, 3), (128, 4),
        (128, 33),
    ],
)  # fmt: skip
@pytest.mark.parametrize("short", [False, True], ids=["", "contexts within a block"])
def test_blocks_and_caches_of_any_size(
    model: TinyModel, device: str, block_size: int, num_blocks: int, short: bool
) -> None:
    length = min(block_size if short else (num_blocks - 1) * block_size, 200)
    if length < 2:
        pytest.skip("no prompt and no token fit")
    options: dict[str, Any] = {
        "block_size": block_size, "num_blocks": num_blocks, "max_model_len": length,
        "max_num_seqs": 3, "max_num_batched_tokens": 16,
    }  # fmt: skip
    prompts = [random_ids(n, max(1, (length - 1) * n // 4)) for n in (1, 2, 3, 4)]
    params = [greedy(min(6, length - len(each))) for each in prompts]
    expected = generate(make_llm(model, device, **options), prompts, params)
    llm = watched(model, device, **options, graph_buckets="decode=1,3;mixed=4,16")
    assert generate(llm, prompts, params) == expected
    assert_no_alarm(llm)


def test_two_engines_in_threads(model: TinyModel, device: str, oracle: Oracle) -> None:
    expected = oracle()
    engines = [watched(model, device, graph_mode=each) for each in ("full", "breakable")]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, engines)) == [expected, expected]
    for llm in engines:
        assert_no_alarm(llm)


@pytest.mark.parametrize("place", ["norm", "matrix"])
def test_what_overflows(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """With logits that are no numbers, which end requests if anybody looks."""
    broken = random_model("qwen3")
    names = {"norm": "model.norm.weight", "matrix": "model.layers.1.mlp.down_proj.weight"}
    dict(broken.named_parameters())[names[place]].view(-1)[:3] = torch.finfo(torch.float32).max
    broken.save_pretrained(tmp_path)
    llm = watched(tmp_path, device)
    with pytest.raises(NonFiniteError):
        serve(llm)
    monkeypatch.setattr(PendingOutput, "_odd", staticmethod(lambda peaks: []))
    serve(llm)
    assert_no_alarm(llm, verified=False)  # nothing is proven on such logits


def test_weights_replaced_in_place(
    model: TinyModel, tiny: TinyModels, device: str, oracle: Oracle
) -> None:
    llm = watched(model, device)
    assert serve(llm) == oracle()
    other = tiny("qwen3", seed=7)
    llm.update_weights(random_model("qwen3", 7).state_dict())
    assert serve(llm) == serve(make_llm(other, device, **OPTIONS))
    assert_no_alarm(llm)


def test_threads_and_denormals(model: TinyModel, device: str, oracle: Oracle) -> None:
    """What they change, they change for both runs of a step."""
    if device != "cpu":
        pytest.skip("settings of the CPU")
    llm = watched(model, device)
    threads = torch.get_num_threads()
    try:
        for count, flush in ((2, True), (1, False)):
            torch.set_num_threads(count)
            torch.set_flush_denormal(flush)
            assert serve(llm) == oracle()
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    assert_no_alarm(llm)


def test_draws_with_all_that_the_sampler_keeps(model: TinyModel, device: str) -> None:
    """Its memory lies beside the step, and changes from draw to draw."""
    params: dict[str, Any] = {
        "frequency_penalty": 0.4, "repetition_penalty": 1.2, "logit_bias": {5: 2.0},
        "min_tokens": 4, "logprobs": 2,
    }  # fmt: skip
    llm = watched(model, device)
    assert serve(llm, **params) == serve(make_llm(model, device, **OPTIONS), **params)
    assert_no_alarm(llm)


@pytest.mark.parametrize(("num_blocks", "max_model_len"), [(12, 176), (24, 256)])
def test_a_cache_that_one_step_nearly_fills(
    tiny: TinyModels, device: str, num_blocks: int, max_model_len: int
) -> None:
    """What probes write then lies in both halves of it."""
    model = tiny("llama")
    llm = make_llm(
        model, device, block_size=16, num_blocks=num_blocks, max_num_seqs=8,
        max_num_batched_tokens=256, max_model_len=max_model_len, graph_mode="full",
        graph_buckets="decode=1,8;mixed=256", graph_verify="canary:1",
    )  # fmt: skip
    prompts = [random_ids(31 + n, 20 + 40 * n) for n in range(3)]
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(8)), strict=True):
        assert model.is_greedy(prompt, output)
    report = llm.graph_report()
    assert all(each.probes == each.planned_probes > 0 for each in report.graphs)
    assert report.quarantined == []

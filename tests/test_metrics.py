"""Metrics against what the outputs themselves say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers import TinyModel, TinyModels, assert_idle, greedy, make_llm, random_ids
from hypothesis import given
from hypothesis import strategies as st

from reprise import LLM, AsyncLLM, SamplingParams
from reprise.metrics import Counter, Distribution, Gauge, Histogram, Metric, steps_1_2_5

PROMPTS = [random_ids(1, 20), random_ids(2, 40), random_ids(3, 3)]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def by_name(metrics: list[Metric]) -> dict[str, Any]:
    """Values by name, and by name and reason where there are several."""
    found: dict[str, Any] = {}
    for each in metrics:
        assert each.name.startswith("reprise:")
        reason = each.labels.get("finished_reason")
        name = each.name.removeprefix("reprise:") + (f"/{reason}" if reason else "")
        assert name not in found
        found[name] = each if isinstance(each, Histogram) else each.value
    return found


def test_of_a_batch(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device)
    before = by_name(llm.get_metrics())
    assert {type(each) for each in llm.get_metrics()} == {Gauge, Counter, Histogram}
    assert all(
        (each.count if isinstance(each, Histogram) else each) == 0 for each in before.values()
    )
    params = [greedy(5), greedy(8, n=2), greedy(3, stop_token_ids=range(160))]
    outputs = llm.generate(PROMPTS, params) + llm.generate(PROMPTS[:1], params[:1])
    completions = [each for output in outputs for each in output.outputs]
    lengths = [len(each.token_ids) for each in completions]
    prompts = [len(output.prompt_token_ids) for output in outputs for _ in output.outputs]
    found = by_name(llm.get_metrics())
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0
    assert found["kv_cache_usage_perc"] == 0
    assert found["prompt_tokens"] == sum(prompts)
    assert found["generation_tokens"] == sum(lengths)
    assert found["prefix_cache_queries"] == sum(prompts)
    hits = [each.num_cached_tokens * len(each.outputs) for each in outputs]
    assert found["prefix_cache_hits"] == sum(hits) > 0
    for reason in ("stop", "length", "abort"):
        count = sum(each.finish_reason == reason for each in completions)
        assert found[f"request_success/{reason}"] == count
    assert {each.labels["model_name"] for each in llm.get_metrics()} == {str(model.path)}
    for name, values in (
        ("request_prompt_tokens", prompts),
        ("request_generation_tokens", lengths),
        ("request_params_max_tokens", [5, 8, 8, 3, 5]),
        ("request_params_n", [1, 2, 2, 1, 1]),
    ):
        assert (found[name].count, found[name].sum) == (len(values), sum(values))
        for bound, count in found[name].buckets.items():
            assert count == sum(value <= float(bound) for value in values)
    # The last token of a completion is never computed.
    computed = sum(prompts) - sum(hits) + sum(lengths) - len(lengths)
    assert found["iteration_tokens_total"].sum == computed
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert found[name].count == len(completions)
        assert 0 < found[name].sum < 1000
    parts = ("queue_time", "prefill_time", "decode_time")
    total = sum(found[f"request_{part}_seconds"].sum for part in parts)
    assert total == pytest.approx(found["e2e_request_latency_seconds"].sum, rel=0.2)
    assert_idle(llm)


def test_of_what_runs_and_was_aborted(model: TinyModel, device: str) -> None:
    llm: LLM = make_llm(model, device, max_num_seqs=1)
    llm.engine.add("runs", PROMPTS[0], greedy(50))
    llm.engine.add("waits", PROMPTS[1], greedy(50))
    for _ in range(3):
        llm.engine.step()
    found = by_name(llm.get_metrics())
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 1)
    assert 0 < found["kv_cache_usage_perc"] < 1
    llm.engine.abort(["runs", "waits"])
    found = by_name(llm.get_metrics())
    assert found["request_success/abort"] == found["e2e_request_latency_seconds"].count == 2
    assert found["time_to_first_token_seconds"].count == 1


def test_of_a_served_engine(model: TinyModel, device: str) -> None:
    async def main() -> dict[str, Any]:
        async with AsyncLLM(
            str(model.path), device=device, num_blocks=33, max_num_seqs=2, dtype="float32",
            skip_tokenizer_init=True, graph_mode="none",
        ) as llm:  # fmt: skip
            async for _ in llm.generate(PROMPTS[0], SamplingParams(max_tokens=4)):
                pass
            assert await llm.reset_prefix_cache() is True
            return by_name(await llm.get_metrics())

    assert asyncio.run(main())["generation_tokens"] == 4


@given(st.lists(st.floats(0, 5000)), st.integers(1, 3000))
def test_buckets_count_values_up_to_their_bound(values: list[float], largest: int) -> None:
    distribution = Distribution(steps_1_2_5(largest))
    for value in values:
        distribution.add(value)
    found = distribution.histogram("name", {})
    assert found.count == len(values)
    assert found.sum == pytest.approx(sum(values))
    assert list(found.buckets)[-1] == "+Inf"
    for bound, count in found.buckets.items():
        assert count == sum(value <= float(bound) for value in values)
    bounds = [float(each) for each in list(found.buckets)[:-1]]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= largest < bounds[-1] * 2.5

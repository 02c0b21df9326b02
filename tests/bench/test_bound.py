"""What a run must take, against counts by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TinyModels, make_llm

from reprise.bench.bound import Chunk, ModelWork, Work, bounds, scheduled
from reprise.bench.drive import random_prompts, run
from reprise.bench.floor import Floor
from reprise.bench.where import by_kind, kind_of
from reprise.layers import SparseMLP

FLOOR = Floor(1e9, 1e9, 1e12)
"""A billion bytes and a trillion operations a second."""


def tiny_work(tiny: TinyModels, device: str, kind: str = "qwen3", **options: Any) -> Any:
    fields = options.pop("fields", {})
    llm = make_llm(tiny(kind, **fields), device, **options)
    model = llm.engine.runner.model
    return llm, ModelWork(model), llm.engine.runner.model


def sizes(model: Any) -> SimpleNamespace:
    mixer = model.model.layers[0].self_attn
    return SimpleNamespace(
        layers=len(model.model.layers), hidden=model.hidden_size, vocab=model.vocab_size,
        q=mixer.num_heads * mixer.head_size, kv=mixer.num_kv_heads * mixer.head_size,
        heads=mixer.num_kv_heads, inner=96,
    )  # fmt: skip


def test_a_step_by_hand(tiny: TinyModels, device: str) -> None:
    """A chunk of 3 behind 5 tokens beside a decode behind 9, in float32; the head is tied."""
    _, work, model = tiny_work(tiny, device)
    n = sizes(model)
    matrices = n.hidden * (n.q + 2 * n.kv) + n.q * n.hidden + 3 * n.hidden * n.inner
    norms = 2 * n.hidden + 2 * model.model.layers[0].self_attn.head_size
    found = work.step([Chunk(5, 3, 0), Chunk(9, 1, 1)])
    weights = n.layers * (matrices + norms) + n.hidden + n.vocab * n.hidden
    assert found.weight_bytes == 4 * weights
    # Of both all earlier tokens and the new ones are read, and the new ones are written.
    assert found.cache_bytes == n.layers * 2 * n.kv * 4 * ((8 + 3) + (10 + 1))
    attention = n.layers * 4 * n.q * (6 + 7 + 8 + 10)
    head = 2 * n.vocab * n.hidden * 1
    assert found.operations == 2 * 4 * n.layers * matrices + head + attention
    assert found.total_bytes == found.weight_bytes + found.cache_bytes


def test_a_window_is_counted_as_far_as_it_reaches(tiny: TinyModels, device: str) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    llm, work, model = tiny_work(tiny, device, fields=fields)
    n = sizes(model)
    windows = sum(each.self_attn.sliding_window == 8 for each in model.model.layers)
    assert 0 < windows < n.layers
    kept = n.layers - windows
    found = work.request(Chunk(20, 3, 0))
    row = 2 * n.kv * 4
    # The first new token sees itself and 7 before it.
    assert found.cache_bytes == row * (kept * (23 + 3) + windows * (8 + 2 + 3))
    assert found.operations == 4 * n.q * (kept * (21 + 22 + 23) + windows * 3 * 8)
    early = work.request(Chunk(5, 6, 0))
    assert early.operations == 4 * n.q * (kept * sum(range(6, 12)) + windows * (6 + 7 + 8 * 4))
    del llm


def test_eight_bit_rows_count_with_their_scales(tiny: TinyModels, device: str) -> None:
    llm, work, model = tiny_work(tiny, device, kv_cache_dtype="fp8")
    n = sizes(model)
    assert llm.engine.platform.fp8_dtype is not None
    row = 2 * (n.kv + 4 * n.heads)
    assert work.request(Chunk(9, 1, 1)).cache_bytes == n.layers * row * 11


def test_experts_count_as_they_are_hit(tiny: TinyModels, device: str) -> None:
    _, work, model = tiny_work(tiny, device, "qwen3_moe")
    blocks = [each for each in model.modules() if isinstance(each, SparseMLP)]
    n, top, experts = sizes(model), 3, 8
    one = 3 * n.hidden * 32
    few, many = work.products(1, 0), work.products(1000, 0)
    # One row hits its own; many hit all.
    all_of_them = len(blocks) * experts * one * 4
    assert many.weight_bytes - few.weight_bytes == pytest.approx(all_of_them * (1 - top / experts))
    router = n.hidden * experts
    attention = n.hidden * (n.q + 2 * n.kv) + n.q * n.hidden
    assert few.operations == 2 * n.layers * (attention + router + top * one)


def test_a_recorded_schedule(tiny: TinyModels, device: str) -> None:
    """Every token of every request is computed once, in the steps that there were."""
    inputs, outputs = [30, 4, 17], [5, 9, 1]
    llm, work, _ = tiny_work(
        tiny, device, max_num_batched_tokens=16, max_num_seqs=2, enable_prefix_caching=False
    )
    engine = llm.engine
    with scheduled(engine) as schedule:
        prompts = random_prompts(inputs, engine.vocab_size, 1)
        took = run(engine, prompts, outputs)
    assert len(schedule.steps) >= max(outputs)
    computed = sum(chunk.new for step in schedule.steps for chunk in step)
    # The last token of a request is never computed; one beyond it may be on a device.
    least = sum(inputs) + sum(outputs) - len(inputs)
    assert least <= computed <= least + len(inputs)
    sampled = sum(chunk.sampled for step in schedule.steps for chunk in step)
    assert sum(outputs) <= sampled <= sum(outputs) + len(inputs)
    assert all(chunk.start + chunk.new <= 40 for step in schedule.steps for chunk in step)
    found = bounds(work, schedule, inputs, outputs, FLOOR)
    parts = [work.step(each) for each in schedule.steps]
    assert found.work == sum(parts, Work())
    assert found.of_schedule == pytest.approx(
        sum(max(p.total_bytes / 1e9, p.operations / 1e12) for p in parts)
    )
    assert 0 < schedule.tail(schedule.times[-1] + 1e-3) <= took.seconds + 1
    assert "submit" not in vars(engine.runner)
    # The third request, when the prompts of both others are computed.
    assert schedule.most_waiting == 1
    # By hand: weights as often as the longest output has tokens, the cache for each token of an
    # output but the first, and the prompts' operations behind it.
    moved = sum(work.products(r, r).weight_bytes for r in (3, 2, 2, 2, 2, 1, 1, 1, 1))
    for prompt, output in zip(inputs, outputs, strict=True):
        moved += work.request(Chunk(0, prompt, 1)).cache_bytes
        moved += sum(work.request(Chunk(prompt + n, 1, 1)).cache_bytes for n in range(output - 1))
    operations = sum(work.step([Chunk(0, each, 1)]).operations for each in inputs)
    assert found.of_any == pytest.approx(moved / 1e9 + operations / 1e12)
    assert found.of_any < found.of_schedule


def test_a_bound_is_the_larger_of_bytes_and_operations() -> None:
    assert Work(3e9, 2e9, 1e12).seconds(FLOOR) == 5
    assert Work(1e9, 0, 7e12).seconds(FLOOR) == 7


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("split_attention_kernel", "attention"), ("paged_attention", "attention"),
        ("norm_gated_linear", "products"), ("few_rows_kernel", "products"),
        ("absolute_splits_kernel", "attention"), ("absolute_decode_kernel", "attention"),
        ("small_weight_kernel", "products"),
        ("shared_sums_kernel", "products"), ("two_rows_kernel", "products"),
        ("w4_arranged_kernel", "products"),
        ("fp8_product_kernel", "products"), ("mxfp4_grouped_kernel", "products"),
        ("nvjet_tst_128x64", "products"), ("sm90_xmma_gemm_bf16", "products"),
        ("rotary_cache_kernel", "small"), ("Memcpy DtoD", "small"), ("sample", "small"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_time_that_overlaps_counts_once() -> None:
    def kernel(name: str, begin: float, microseconds: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": microseconds}

    events = [
        kernel("attention_kernel", 0, 100), kernel("linear", 90, 110), kernel("other", 150, 20),
        {"ph": "X", "cat": "cpu_op", "name": "linear", "ts": 0, "dur": 999},
    ]  # fmt: skip
    found = by_kind(events, 1e-3)
    assert found == pytest.approx(
        {"attention": 100e-6, "products": 100e-6, "small": 0.0, "host": 800e-6}
    )
    assert by_kind([], 1.0) is None


def test_the_record_has_the_bound(tiny: TinyModels, device: str) -> None:
    from typer.testing import CliRunner

    from reprise.cli.app import app

    arguments = [
        "bench", "throughput", "--model", str(tiny("qwen3").path), "--device", device,
        "--num-prompts", "6", "--input-len-range", "4:30", "--output-len-range", "3:9",
        "--repeats", "1",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    bound = record["bound"]
    assert 0 < bound["any_seconds"] < record["seconds"]
    assert 0 < bound["schedule_seconds"] < record["seconds"]
    rate = record["output_tokens"] / bound["schedule_seconds"]
    assert bound["schedule_tokens_per_s"] == pytest.approx(rate, rel=1e-3)
    assert set(record["where"]) == {"attention", "products", "small", "host", "tail"}
    assert record["where"]["attention"] > 0 < record["where"]["products"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "of this schedule" in shown
    assert "of these, the tail" in shown


def test_dtypes_of_the_floor_are_the_engines(tiny: TinyModels, device: str) -> None:
    _, work, model = tiny_work(tiny, device, dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    full = tiny_work(tiny, device)[1].products(1, 1).weight_bytes
    assert work.products(1, 1).weight_bytes == full / 2

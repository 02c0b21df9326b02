"""Windows give back what has left them: more requests run, and none computes another token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids
from planted import planted

import reprise
from reprise import models
from reprise.cache import CacheManager
from reprise.cache.layout import CacheLayout, lay_out_caches
from reprise.cache.memory import plan_blocks
from reprise.config import EngineConfig
from reprise.engine.scheduler import Scheduler
from reprise.layers import Build
from reprise.loading import open_checkpoint
from reprise.ops.registry import all_ops
from reprise.platforms import MemoryInfo, Platform
from reprise.request import Request
from reprise.sampling_params import SamplingParams
from reprise.testing import faults

CONTEXT, WINDOW, BLOCK, REQUESTS, CHUNK = 32768, 1024, 16, 256, 8192
QWEN3 = Path(reprise.__file__).parent / "bench" / "configs" / "qwen3-0.6b"


def qwen3(**fields: Any) -> CacheLayout:
    """Of Qwen3 0.6B with these fields in its config."""
    config = open_checkpoint(str(QWEN3), overrides=fields, config_only=True).config
    model = models.build(config, Build(torch.bfloat16, torch.device("meta"), CONTEXT))
    return lay_out_caches(model.caches(), BLOCK)


def most_running(layout: CacheLayout, target: float) -> int:
    """Requests of almost 32K tokens that run together, until there are enough."""
    scheduler = Scheduler(CacheManager(layout, False), REQUESTS, CHUNK, CONTEXT)
    for number in range(REQUESTS):
        params = SamplingParams(max_tokens=CONTEXT)
        scheduler.add(Request(f"{number}", [7] * (CONTEXT - 1024), params))
    running = [0]
    while running[-1] < target and running[-10:] != [running[-1]] * 10:
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(step, [[5] if each else [] for each in step.samples])
        running.append(scheduler.stats().num_running)
    assert scheduler.stats().total_preemptions == 0
    return max(running)


@pytest.mark.parametrize("before", [5, 10])
@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        pytest.param({"max_window_layers": 0}, 20, id="all layers"),
        pytest.param(
            {"layer_types": ["full_attention", "sliding_attention"] * 14}, 1.8, id="every second"
        ),
    ],
)
def test_more_requests_run_in_the_same_memory(
    platform: Platform, fields: dict[str, Any], factor: float, before: int
) -> None:
    """Than when the rows of all layers were kept."""
    memory = (1 + before * CONTEXT // BLOCK) * qwen3().pools[0].block_bytes
    layout = plan_blocks(
        qwen3(use_sliding_window=True, sliding_window=WINDOW, **fields),
        EngineConfig(model=str(QWEN3), max_num_seqs=REQUESTS, kv_cache_memory_bytes=memory),
        platform,
        max_model_len=CONTEXT,
        max_tokens=CHUNK,
        activation_bytes=0,
    )
    assert sum(each.num_blocks * each.block_bytes for each in layout.pools) <= memory
    assert most_running(layout, factor * before) >= factor * before


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
@pytest.mark.parametrize("chunk", [512, 24])
def test_all_that_has_left_a_window_is_given_back(
    tiny: TinyModels, device: str, architecture: str, chunk: int
) -> None:
    """In a pool that holds a few windows and no whole context; others write what was given back."""
    fields: dict[str, Any] = {"sliding_window": 24}
    if architecture == "qwen3":
        fields |= {"use_sliding_window": True, "max_window_layers": 0}
    model = tiny(architecture, **fields)
    prompts = [random_ids(40 + number, 30 + 25 * number) for number in range(5)]
    llm = make_llm(
        model, device, num_blocks=21, block_size=8, max_num_batched_tokens=chunk, max_num_seqs=4
    )
    assert llm.engine.max_model_len == 256, "a window's pool bounds no context"
    for some in (prompts, prompts[-1:], prompts[-1:]):
        for prompt, output in zip(some, generate(llm, some, greedy(30)), strict=True):
            assert model.is_greedy(prompt, output)
    stats = llm.stats().scheduler
    assert stats.total_prefix_hits > 0
    assert stats.total_preemptions == 0, "each request has a claim to its window"


@pytest.mark.parametrize("executor", ["full", "breakable"])
def test_a_graph_that_sees_what_has_left_a_window_is_refused(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    model = tiny("qwen3", use_sliding_window=True, sliding_window=24, max_window_layers=1)
    prompts = [random_ids(1, 20), random_ids(2, 60)]
    options = {"graph_buckets": "decode=2;mixed=64", "max_num_batched_tokens": 64}
    expected = generate(make_llm(model, device, **options), prompts, greedy(12))
    with planted(monkeypatch, faults.FAULTS["wrong_window"], "paged_attention"):
        llm = make_llm(model, device, **options, graph_mode=executor)
        assert generate(llm, prompts, greedy(12)) == expected
    if faults.FAULTS["wrong_window"].inexpressible(
        all_ops()["paged_attention"], executor, llm.engine.platform
    ):
        assert not llm.graph_report().quarantined
    else:
        assert all(each.quarantined for each in llm.graph_report().graphs)


LIES: list[Any] = [
    MemoryInfo(free=-(1 << 40), total=1 << 30), MemoryInfo(free=0, total=0),
    MemoryInfo(free=0, total=1 << 34), MemoryInfo(free=1 << 60, total=1 << 60),
    RuntimeError("no such counter"), None,
]  # fmt: skip


@pytest.mark.parametrize(
    "told", LIES, ids=["negative", "zero", "none free", "huge", "failing", "nothing"]
)
@pytest.mark.parametrize("size", [{"num_blocks": 40}, {"kv_cache_memory_bytes": 1 << 17}])
def test_all_pools_start_whatever_the_device_tells_of_its_memory(
    tiny: TinyModels, device: str, platform: Platform, monkeypatch: pytest.MonkeyPatch,
    told: Any, size: dict[str, int],
) -> None:  # fmt: skip
    """Rows that are kept, of two layers, and those of a window, in two pools."""
    model = tiny(
        "qwen3", num_hidden_layers=3, use_sliding_window=True, sliding_window=24,
        max_window_layers=2,
    )  # fmt: skip

    def memory_info(self: Platform) -> MemoryInfo:
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(type(platform), "memory_info", memory_info)
    llm = make_llm(model, device, **{"num_blocks": None, **size})
    assert len(llm.engine.runner.cache_layout.pools) == 2
    prompts = [random_ids(1, 60), random_ids(2, 100)]
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(8)), strict=True):
        assert model.is_greedy(prompt, output)
    if isinstance(told, MemoryInfo) and told.free > 1 << 50:
        largest = make_llm(model, device, num_blocks=None)
        assert generate(largest, prompts, greedy(8)) == generate(llm, prompts, greedy(8))

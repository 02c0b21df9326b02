"""``doctor memory`` says before a start what the engine has after it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from helpers import greedy, make_llm, random_ids

from reprise.bench.presets import CONFIGS
from reprise.cache.spec import LayerCache
from reprise.config import EngineConfig
from reprise.doctor.memory import MemoryReport, memory_report
from reprise.errors import ConfigError, ModelError, PlatformError
from reprise.loading.checkpoint import DEMO_MODEL

GIB = 1 << 30
SMALL: dict[str, Any] = {
    "max_num_seqs": 6, "max_num_batched_tokens": 64, "block_size": 8, "max_model_len": 128,
}  # fmt: skip


def report_of(model: Any = None, memory: int | None = None, **options: Any) -> MemoryReport:
    return memory_report(
        EngineConfig(model=None if model is None else str(model), **options), memory
    )


WINDOWS: dict[str, Any] = {
    "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), [("qwen3", {}), ("llama", {}), ("qwen3", WINDOWS)])
def test_parts_are_those_of_the_engine(tiny, device, family, fields) -> None:
    model = tiny(family, **fields)
    options = {**SMALL, "num_blocks": 41, "graph_mode": "none"}
    report = report_of(model.path, device=device, **options)
    runner = make_llm(model, device, **options).engine.runner
    assert report.weights_bytes == sum(each.nbytes for each in runner.model.parameters())
    assert report.buffers["step inputs"] == sum(
        each.nbytes for each in runner.buffers.arrays().values()
    )
    tensors = {
        tensor.data_ptr(): tensor
        for each in runner.model.caches().values()
        for tensor in each.tensors.values()
    }
    assert report.cache_bytes == sum(each.nbytes for each in tensors.values())
    assert [each.blocks for each in report.pools] == [
        each.num_blocks for each in runner.cache_layout.pools
    ]
    assert report.facts["dtype"] == str(runner.dtype).removeprefix("torch.")
    assert sum(each.layers for each in report.caches) == len(runner.model.caches())
    assert report.problem is None


GRAPHS: dict[str, Any] = {"graph_mode": "full", "graph_buckets": "decode=2,4;mixed=32"}


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen3", {"kv_cache_dtype": "fp8"}), ("qwen3_5", {"dtype": "bfloat16"})],
)
def test_graphs_and_draws_take_what_the_engine_says(tiny, device, family, options) -> None:
    """Tensors of several dtypes, none of which lies anywhere on paper."""
    model, options = tiny(family), {**SMALL, **GRAPHS, "num_blocks": 41, **options}
    report = report_of(model.path, device=device, **options)
    runner = make_llm(model, device, **options).engine.runner
    assert report.graphs["comparison_bytes"] == runner.owners.comparison_bytes()
    assert report.buffers["sampler"] == sum(e.nbytes for e in runner.sampler.memory().values())


def test_drafts_that_a_state_cannot_take_back_are_refused_as_by_the_engine(
    tiny, device, monkeypatch
) -> None:
    made = LayerCache.__init__

    def without_drafts(self: LayerCache, lifetime: Any, drafts: int = 0, /, **rows: Any) -> None:
        made(self, lifetime, **rows)

    monkeypatch.setattr(LayerCache, "__init__", without_drafts)
    model = tiny("qwen3_5")
    options = {
        **SMALL, "num_blocks": 41, "graph_mode": "none",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="cannot take back drafts"):
        report_of(model.path, device=device, **options)
    with pytest.raises(ConfigError, match="cannot take back drafts"):
        make_llm(model, device, **options)


def test_a_device_that_is_not_here_has_eight_bits_and_long_contexts_too(tiny) -> None:
    """The tables by position are larger than the embedding."""
    path = tiny("qwen3", max_position_embeddings=8192).path
    options = {"device": "cuda", "dtype": "bfloat16"}
    plain, coded = (
        report_of(path, GIB, **options, kv_cache_dtype=each) for each in ("auto", "fp8")
    )
    assert plain.tables_bytes > max(each.bytes for each in plain.weights)
    assert coded.caches[0].request_bytes < plain.caches[0].request_bytes


def test_a_context_that_was_asked_for_and_does_not_fit_is_a_problem(tiny, device) -> None:
    path, few = tiny("qwen3").path, {"num_blocks": 9, "block_size": 8}
    assert report_of(path, device=device, **few).problem is None, "the engine shortens it"
    asked = report_of(path, device=device, **few, max_model_len=128)
    assert "lower max_model_len to" in (asked.problem or "")
    assert asked.pools


def test_as_many_requests_as_it_says_run_at_once(tiny, device) -> None:
    model = tiny("qwen3")
    options = {**SMALL, "num_blocks": 42, "enable_prefix_caching": False}
    report = report_of(model.path, device=device, **options)
    (long,) = (each for each in report.capacities if each.tokens == 128)
    assert (long.requests, long.limit) == (2, "cache")
    engine = make_llm(model, device, **options).engine
    for count in (long.requests, long.requests + 1):
        preemptions, most = engine.stats().scheduler.total_preemptions, 0
        for number in range(count):
            prompt = {"prompt_token_ids": random_ids(number, 64)}
            engine.add(f"{count} {number}", prompt, greedy(64))
        while engine.stats().num_requests:
            engine.step()
            most = max(most, engine.stats().scheduler.num_running)
        undisturbed = engine.stats().scheduler.total_preemptions == preemptions
        # One request more has to wait, or grows into what the others need.
        assert (most == count and undisturbed) == (count == long.requests)


def test_windows_bound_what_a_request_takes() -> None:
    every, second = (
        report_of(CONFIGS / "qwen3-8b", 80 * GIB, device="cuda", hf_overrides=overrides)
        for overrides in (
            {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 0},
            {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 18},
        )
    )
    plain = report_of(CONFIGS / "qwen3-8b", 80 * GIB, device="cuda")
    assert [each.lifetime for each in every.caches] == ["window of 1024"]
    assert [each.layers for each in second.caches] == [18, 18]
    of_32k = [
        next(each for each in report.capacities if each.tokens == 32768)
        for report in (plain, second, every)
    ]
    assert of_32k[1].requests >= 1.8 * of_32k[0].requests
    assert of_32k[2].requests >= 20 * of_32k[0].requests


def test_a_device_that_is_not_here(tiny) -> None:
    report = report_of(tiny("qwen3").path, 2 * GIB, device="cuda", max_model_len=64)
    assert report.facts["platform"] == "cuda"
    assert report.facts["memory_total"] == 2 * GIB
    assert report.facts["dtype"] in ("bfloat16", "float32")
    assert report.graphs["buckets"]["decode"] > 1
    # All that the option leaves to the cache, less what is kept free for the allocator.
    left = int(0.92 * 2 * GIB) - report.fixed_bytes - GIB // 4
    assert left - report.cache_bytes >= 0 or report.capacities[-1].limit == "max_num_seqs"


def test_more_memory_holds_more_requests() -> None:
    reports = [report_of(CONFIGS / "qwen3-0.6b", size * GIB, device="cuda") for size in (4, 8, 16)]
    blocks = [each.pools[0].blocks for each in reports]
    assert blocks == sorted(set(blocks))
    for smaller, larger in itertools.pairwise(reports):
        for one, other in zip(smaller.capacities, larger.capacities, strict=True):
            assert one.requests <= other.requests
            assert one.request_bytes == other.request_bytes


def test_what_does_not_fit_is_shown_all_the_same(tiny, invoke) -> None:
    arguments = ("doctor", "memory", "--model", str(tiny("qwen3").path), "--device", "cuda")
    done = invoke(*arguments, "--memory", "0.2")
    assert done.exit_code == 2
    assert "lm_head.weight" in done.stdout or "embed_tokens.weight" in done.stdout
    assert "has room for 0 block(s)" in done.stderr
    done = invoke(*arguments, "--memory", "0.2", "--json")
    assert done.exit_code == 2
    assert "has room for" in json.loads(done.stdout)["problem"]


def test_nothing_is_loaded(tmp_path) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    del config["layer_types"]
    config |= {"num_hidden_layers": 80, "hidden_size": 16384, "intermediate_size": 65536}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = report_of(tmp_path, 1000 * GIB, device="cuda")
    assert report.weights_bytes > 400 * GIB


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"device": "nonsense"}, PlatformError, "unknown"),
        ({"max_model_len": 1 << 40}, ModelError, "max_model_len"),
        ({"model": "/no/such/model"}, ModelError, "no such directory"),
    ],
)
def test_bad_options_are_refused(options, error, told) -> None:
    with pytest.raises(error, match=told):
        memory_report(EngineConfig(**options), GIB)


def test_the_command(invoke, device) -> None:
    done = invoke("doctor", "memory", "--device", device, "--json", "--num-blocks", "65")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [each["blocks"] for each in report["pools"]] == [65]
    assert report["caches"][0]["lifetime"] == "kept"
    text = " ".join(invoke("doctor", "memory", "--device", device).stdout.split())
    for expected in ("Weights", "Caches", "activations", "Requests that can run at once"):
        assert expected in text
    for size in ("-1", "inf", "nan"):
        refused = invoke("doctor", "memory", "--memory", size)
        assert refused.exit_code == 2
        assert "more than 0" in refused.stderr

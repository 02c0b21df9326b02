"""``batch_invariant``: to the bit the same answers in every batch, step by step and end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from draft_heads import write_head
from helpers import HYBRIDS, TinyModel, TinyModels, make_llm
from matrix import CHECKPOINT, ahead_of_its_tokens
from quantized import quantized

from reprise.doctor import compositions
from reprise.layers import gated_delta
from reprise.ops import OpTable
from reprise.platforms import Platform

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_5": {"num_hidden_layers": 2, "full_attention_interval": 2},
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}  # fmt: skip
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 3}
HEAD = {"method": "eagle3", "num_speculative_tokens": 7}
BUCKETS = {"graph_buckets": "decode=3,6;mixed=32"}
FULL = {**BUCKETS, "graph_mode": "full"}
BREAKABLE = {**BUCKETS, "graph_mode": "breakable"}
CROWDS = {"max_num_seqs": 130, "num_blocks": 3500}
ENGINES: dict[str, dict[str, Any]] = {
    "eager, chunks": {"max_num_batched_tokens": 24},
    "full graphs, drafts": {**FULL, "speculative_config": NGRAM},
    "breakable graphs, few blocks": {**BREAKABLE, "num_blocks": 32},
    "draft model, few blocks": {**FULL, "speculative_config": DRAFT_MODEL, "num_blocks": 36},
    "head, chunks": {**BREAKABLE, "speculative_config": HEAD, "max_num_batched_tokens": 49},
    "crowds": {**CROWDS, "max_num_batched_tokens": 260},
    "crowds, full graphs": {**CROWDS, "graph_mode": "full", "max_num_batched_tokens": 195,
                            "graph_buckets": "decode=8,17,64,130;mixed=195"},
    "small chunks, run ahead": {"max_num_batched_tokens": 9, "ahead": True},
    "bfloat16": {"dtype": "bfloat16", "max_num_batched_tokens": 40},
    "float16": {"dtype": "float16", "max_num_batched_tokens": 65},
    "codes": {"kv_cache_dtype": "fp8"},
    "large blocks": {"block_size": 32, "max_num_batched_tokens": 50},
    "compiled": {**BUCKETS, "graph_mode": "compiled"},
}  # fmt: skip
"""Options of those whose batches are looked at; what is expected is of a plain one. ``ahead``: the
next step is submitted before this one's tokens are known."""
SHORT = {
    "llama": "bfloat16",
    "qwen3": "breakable graphs, few blocks",
    "qwen3_moe": "eager, chunks",
    "qwen3_5": "full graphs, drafts",
}
LONGEST = 150
"""Tokens of a request: some splits of attention."""


@pytest.fixture(autouse=True)
def short_states(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> None:
    monkeypatch.setattr(gated_delta, "STATE", CHECKPOINT)
    if not OpTable(platform, batch_invariant=True).candidates["linear"]:
        pytest.skip("no implementation of products promises it here")


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def drafting(
    tiny: TinyModels, model: TinyModel, config: dict[str, Any], *, hybrid: bool
) -> dict[str, Any]:
    """With the model or the head that drafts."""
    if config["method"] == "ngram":
        return config
    if config["method"] == "draft_model":
        # None can have states: for a hybrid it is a model of another kind.
        return {**config, "model": str((tiny() if hybrid else tiny.near(model)).path)}
    path = model.path.with_name(f"{model.path.name}-head")
    path = path if path.exists() else write_head(path, model, depths=(0, 1, 2))
    return {**config, "model": str(path)}


def watched(
    tiny: TinyModels,
    device: str,
    family: str,
    engine: str,
    count: int,
    *,
    kinds: int = 24,
    method: str | None = None,
    **both: Any,
) -> compositions.Found:
    """``kinds``: requests that batches are made of; ``method``: of weights of fewer bits; ``both``:
    options of both engines."""
    model = tiny(family, **FAMILIES[family])
    if method is not None:
        model = quantized(model, method)
    options = dict(ENGINES[engine])
    ahead = options.pop("ahead", False)
    numbers = {name: options[name] for name in ("dtype", "kv_cache_dtype") if name in options}
    common = {"batch_invariant": True, "block_size": 8, "max_num_seqs": 6, "num_blocks": 400,
              **both}  # fmt: skip
    plain = make_llm(model, device, **{**common, **numbers, "enable_prefix_caching": False})
    subjects = compositions.make_subjects(plain.engine.vocab_size, LONGEST, kinds)
    expected = compositions.alone(plain, subjects)
    if "speculative_config" in options:
        options["speculative_config"] = drafting(
            tiny, model, options["speculative_config"], hybrid=family in HYBRIDS
        )
    make = ahead_of_its_tokens if ahead else make_llm
    llm = make(model, device, **{**common, **options})
    found = compositions.run(llm, subjects, expected, count)
    print(f"{family}, {engine}: {found}", flush=True)
    return found


def agree(found: compositions.Found, count: int) -> None:
    assert not found.wrong, found.wrong
    assert len(found.compositions) >= count
    assert found.requests > count // 10
    assert max(found.rows) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_random_batches_have_the_bits_that_they_have_alone(
    tiny: TinyModels, device: str, family: str
) -> None:
    found = watched(tiny, device, family, SHORT[family], 40, kinds=6)
    agree(found, 40)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_ten_thousand_batches_a_family(
    tiny: TinyModels, device: str, family: str, engine: str
) -> None:
    count = -(-10_000 // len(ENGINES))
    found = watched(tiny, device, family, engine, count)
    agree(found, count)
    options = ENGINES[engine]
    # What the engine is there for has happened.
    assert len(found.cached) > 1
    assert bool(found.drafted) == ("speculative_config" in options)
    # Windows give blocks back: who was admitted there keeps what it has.
    windows = "sliding_window" in FAMILIES[family]
    assert found.preempted or windows or options.get("num_blocks", 400) >= 400
    assert max(found.rows) > (64 if "max_num_seqs" in options else 3)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_with_another_number_of_threads(
    tiny: TinyModels, device: str, threads: None, family: str
) -> None:
    torch.set_num_threads(2)
    agree(watched(tiny, device, family, "eager, chunks", 40, kinds=6), 40)


@pytest.mark.parametrize("method", ["fp8", "awq"])
def test_so_it_is_with_weights_of_fewer_bits(tiny: TinyModels, device: str, method: str) -> None:
    agree(watched(tiny, device, "llama", "eager, chunks", 40, kinds=4, method=method), 40)


@pytest.mark.long
def test_so_it_is_on_two_ranks(tiny: TinyModels, device: str) -> None:
    """Each answer's bits are those of its request alone on as many ranks."""
    if device != "cpu":
        pytest.skip("these ranks share a CPU")
    ranks = {"tensor_parallel_size": 2}
    for engine in ("eager, chunks", "full graphs, drafts"):
        agree(watched(tiny, device, "qwen3_moe", engine, 60, kinds=8, **ranks), 60)


def test_without_the_option_bits_depend_on_the_batch(tiny: TinyModels, device: str) -> None:
    """The comparison sees it where it is so: products of one row and of several are summed in
    other orders by any BLAS that is worth its name."""
    found = watched(tiny, device, "llama", "eager, chunks", 60, kinds=6, batch_invariant=False)
    assert found.wrong

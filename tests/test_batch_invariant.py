"""``batch_invariant``: to the bit the same answers in every batch, step by step and end to end."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import TinyModels, make_llm
from matrix import CHECKPOINT

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
BUCKETS = {"graph_buckets": "decode=3,6;mixed=32"}
ENGINES: dict[str, dict[str, Any]] = {
    "eager, chunks": {"max_num_batched_tokens": 24},
    "full graphs, drafts": {**BUCKETS, "graph_mode": "full", "speculative_config": NGRAM},
    "breakable graphs, few blocks": {**BUCKETS, "graph_mode": "breakable", "num_blocks": 40},
    "bfloat16": {"dtype": "bfloat16", "max_num_batched_tokens": 40},
    "codes": {"kv_cache_dtype": "fp8"},
    "compiled": {**BUCKETS, "graph_mode": "compiled"},
}
"""Options of those whose batches are looked at; what is expected is of a plain one."""
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


def watched(
    tiny: TinyModels,
    device: str,
    family: str,
    engine: str,
    count: int,
    *,
    kinds: int = 24,
    invariant: bool = True,
) -> compositions.Found:
    """``kinds``: requests that batches are made of."""
    model = tiny(family, **FAMILIES[family])
    options = ENGINES[engine]
    numbers = {name: options[name] for name in ("dtype", "kv_cache_dtype") if name in options}
    common = {"batch_invariant": invariant, "block_size": 8, "max_num_seqs": 6,
              "num_blocks": 400}  # fmt: skip
    plain = make_llm(model, device, **{**common, **numbers, "enable_prefix_caching": False})
    subjects = compositions.make_subjects(plain.engine.vocab_size, LONGEST, kinds)
    expected = compositions.alone(plain, subjects)
    llm = make_llm(model, device, **{**common, **options})
    return compositions.run(llm, subjects, expected, count)


def agree(found: compositions.Found, count: int) -> None:
    print(f"{len(found.compositions)} compositions, {found.requests} requests, at most "
          f"{found.largest} at once, {found.cached} prefix hits")  # fmt: skip
    assert not found.wrong, found.wrong
    assert len(found.compositions) >= count
    assert found.requests > count // 10
    assert found.largest > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_random_batches_have_the_bits_that_they_have_alone(
    tiny: TinyModels, device: str, family: str
) -> None:
    found = watched(tiny, device, family, SHORT[family], 40, kinds=6)
    agree(found, 40)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_ten_thousand_batches_a_family(
    tiny: TinyModels, device: str, family: str, engine: str
) -> None:
    count = -(-10_000 // len(ENGINES))
    found = watched(tiny, device, family, engine, count)
    agree(found, count)
    assert found.cached


def test_without_the_option_bits_depend_on_the_batch(tiny: TinyModels, device: str) -> None:
    """The comparison sees it where it is so: products of one row and of several are summed in
    other orders by any BLAS that is worth its name."""
    found = watched(tiny, device, "llama", "eager, chunks", 60, kinds=6, invariant=False)
    assert found.wrong

"""How large the cache becomes, and what that does to the longest context."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers import CONTEXT, TinyModel, TinyModels, generate, greedy, make_llm, random_ids

from reprise import LLM

BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Two layers, keys and values, two heads of 16 channels, float32."""


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def cache_bytes(llm: LLM) -> int:
    caches = llm.engine.runner.model.caches().values()
    return sum(each.nbytes for cache in caches for each in cache.tensors.values())


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("budget", [100_000, 262_144])
def test_the_cache_takes_what_it_may(
    model: TinyModel, device: str, block_size: int, budget: int
) -> None:
    llm = make_llm(
        model, device, num_blocks=None, kv_cache_memory_bytes=budget, block_size=block_size
    )
    taken = cache_bytes(llm)
    assert taken == llm.engine.runner.num_blocks * block_size * BYTES_PER_TOKEN
    assert budget - block_size * BYTES_PER_TOKEN < taken <= budget
    assert len(generate(llm, [random_ids(1, 30)], greedy(4))[0]) == 4


def test_the_cache_takes_no_more_than_requests_can_fill(model: TinyModel, device: str) -> None:
    """One block more than all requests at full length: the null block."""
    llm = make_llm(
        model, device, num_blocks=None, kv_cache_memory_bytes=1 << 28, block_size=16, max_num_seqs=3
    )
    assert llm.engine.runner.num_blocks == 3 * math.ceil(CONTEXT / 16) + 1
    prompts = [random_ids(n, CONTEXT - 1) for n in range(3)]
    assert [len(each) for each in generate(llm, prompts, greedy(9))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_blocks": 1000}, CONTEXT),
        ({"num_blocks": 9}, 8 * 16),
        ({"num_blocks": 2}, 16),
        ({"num_blocks": 9, "max_model_len": 100}, 100),
        ({"num_blocks": 9, "block_size": 32}, CONTEXT),
    ],
)
def test_the_longest_context_that_fits(
    model: TinyModel, device: str, options: dict[str, Any], expected: int
) -> None:
    llm = make_llm(model, device, **{"block_size": 16, **options})
    assert llm.engine.max_model_len == expected
    output = llm.generate([random_ids(1, 10)], greedy(CONTEXT))[0].outputs[0]
    assert len(output.token_ids) == expected - 10
    assert output.finish_reason == "length"

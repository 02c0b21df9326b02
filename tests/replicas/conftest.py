"""Two replicas, for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from reprise import LLM

OPTIONS: dict[str, Any] = {
    "num_blocks": 120, "dtype": "float32", "graph_mode": "full", "max_num_seqs": 4,
    "graph_buckets": "decode=1,4;mixed=32", "max_num_batched_tokens": 32, "max_logprobs": -1,
}  # fmt: skip


@pytest.fixture(scope="module")
def options(device: str) -> dict[str, Any]:
    """Of one engine and of each replica."""
    return {**OPTIONS, "device": device}


@pytest.fixture(scope="module")
def one(options: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**options) as llm:
        yield llm


@pytest.fixture(scope="module")
def pair(options: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**options, data_parallel_size=2) as llm:
        yield llm

"""Attention of prompts by warpgroups: what it computes, and what it leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from reprise.ops import OpTable, paged_attention
from reprise.platforms import Platform


def arguments(
    device: torch.device,
    lengths: list[int],
    new: list[int],
    heads: int,
    kv_heads: int,
    size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 3,
) -> dict[str, Any]:
    """Requests in scattered blocks; slots that hold none of their tokens are NaN."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    counts = [math.ceil(each / 16) for each in lengths]
    caches = torch.full((2, sum(counts) + 2, 16, kv_heads, size), math.nan).to(dtype)
    order = torch.randperm(sum(counts), generator=generator) + 1
    tables = torch.zeros(len(lengths), max(counts) + 3, dtype=torch.int32)
    for row, (length, blocks) in enumerate(zip(lengths, order.split(counts), strict=True)):
        tables[row, : len(blocks)] = blocks
        slots = (blocks.unsqueeze(1) * 16 + torch.arange(16)).flatten()[:length]
        caches.flatten(1, 2)[:, slots] = randn(2, length, kv_heads, size)
    query = randn(sum(new) + padding, heads, size)
    found = {
        "query": query,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_tables": tables,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, *new]).cumsum(0).to(torch.int32),
        "out": torch.full_like(query, math.nan),
        "scale": size**-0.5,
        "sliding_window": 0,
        "soft_cap": 0.0,
        "query_len": 0,
        "key_scales": None,
        "value_scales": None,
        "prompt": 0,
    }
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in found.items()}


@pytest.fixture
def kernel() -> Any:
    import importlib

    pytest.importorskip("triton.experimental.gluon")
    # The package has an op of the same name as itself.
    return importlib.import_module("reprise.ops.paged_attention.warpgroup_kernel")


@pytest.mark.parametrize(
    ("lengths", "new", "heads", "kv_heads", "size", "dtype"),
    [
        ([1], [1], 32, 8, 128, torch.bfloat16),
        ([128], [128], 32, 8, 128, torch.bfloat16),
        ([129], [129], 32, 8, 128, torch.bfloat16),
        ([5, 40, 700, 129, 1, 64, 33], [5, 3, 600, 1, 1, 64, 1], 32, 8, 128, torch.bfloat16),
        ([300, 77, 1000], [300, 7, 500], 16, 8, 128, torch.bfloat16),
        ([300, 513], [300, 200], 8, 8, 128, torch.bfloat16),
        ([300, 130], [300, 130], 40, 8, 128, torch.bfloat16),
        ([257], [257], 28, 4, 128, torch.bfloat16),
        ([300], [200], 128, 1, 128, torch.bfloat16),
        ([300, 130], [300, 130], 32, 8, 64, torch.bfloat16),
        ([300, 130], [300, 130], 32, 8, 128, torch.float16),
    ],
    ids=str,
)
def test_prompts_and_chunks_are_attended_to(
    platform: Platform, kernel, monkeypatch, lengths, new, heads, kv_heads, size, dtype
) -> None:
    if not platform.warpgroup_products:
        pytest.skip("no warpgroups")

    def wrong(*_: Any, **__: Any) -> None:
        raise AssertionError("left to Triton")

    monkeypatch.setattr(kernel, "bind_triton", wrong)
    call = arguments(platform.device, lengths, new, heads, kv_heads, size, dtype)
    expected = {**call, "out": torch.zeros_like(call["out"])}
    paged_attention.implementations["reference"].function(**expected)
    with torch.inference_mode(), OpTable(platform, {"paged_attention": "warpgroups"}).activate():
        paged_attention(*call.values())
    torch.testing.assert_close(call["out"], expected["out"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("others", "taken"),
    [
        ({}, True),
        ({"query_len": 1}, False),
        ({"sliding_window": 9}, False),
        ({"soft_cap": 3.0}, False),
        ({"key_scales": torch.zeros(1)}, False),
        ({"query": torch.zeros(3, 4, 64)}, False),
        ({"query": torch.zeros(3, 4, 96).bfloat16()}, False),
        ({"query": torch.zeros(3, 512, 64).bfloat16()}, False),
        ({"key_cache": torch.zeros(2, 48, 2, 64).bfloat16()}, False),
        ({"value_cache": torch.zeros(8193).bfloat16()[1:].view(4, 16, 2, 64)}, False),
        ({"key_cache": torch.zeros(2, 16, 2, 65).bfloat16()[..., :64]}, False),
    ],
    ids=str,
)
def test_all_else_is_left_to_triton(kernel, others, taken) -> None:
    from reprise.ops.paged_attention.attend import Call

    call = arguments(torch.device("cpu"), [3], [3], 4, 2, 64, padding=0)
    assert kernel.takes(Call(**{**call, **others})) is taken

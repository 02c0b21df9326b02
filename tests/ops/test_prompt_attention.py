"""Attention of whole prompts by a vendor's kernel: what it computes, and what it leaves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from reprise.ops import OpTable, paged_attention
from reprise.platforms import Platform
from reprise.platforms.prompt_attention import by_torch
from reprise.step import Admission, Step


@pytest.fixture
def vendors(platform: Platform) -> Platform:
    """The platform, with a kernel for prompts: its own one, else torch's for all devices."""
    if not platform.has_triton:
        pytest.skip("what it leaves is Triton's")
    if platform.prompt_attention is not None:
        return platform
    with_one = copy.copy(platform)
    with_one.prompt_attention = by_torch(SDPBackend.FLASH_ATTENTION)
    return with_one


def arguments(platform: Platform, tokens: int, **others: Any) -> dict[str, Any]:
    """One request of so many new tokens; slots of the cache that hold none of them are NaN."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    count = math.ceil(tokens / 16)
    caches = torch.full((2, count + 3, 16, 2, 64), math.nan).bfloat16()
    blocks = torch.randperm(count + 2, generator=generator)[:count] + 1
    slots = (blocks.unsqueeze(1) * 16 + torch.arange(16)).flatten()[:tokens]
    caches.flatten(1, 2)[:, slots] = randn(2, tokens, 2, 64)
    tables = torch.zeros(1, count + 5, dtype=torch.int32)
    tables[0, :count] = blocks
    query = randn(tokens, 4, 64)
    found = {
        "query": query,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_tables": tables,
        "seq_lens": torch.tensor([tokens], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, tokens], dtype=torch.int32),
        "out": torch.full_like(query, math.nan),
        "scale": 0.1,
        "sliding_window": 0,
        "soft_cap": 0.0,
        "query_len": 0,
        "key_scales": None,
        "value_scales": None,
        "prompt": tokens,
    }
    moved = {k: v.to(platform.device) if torch.is_tensor(v) else v for k, v in found.items()}
    return {**moved, **others}


def attended(platform: Platform, call: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode(), OpTable(platform, {"paged_attention": "prompt"}).activate():
        paged_attention(*call.values())
    return call["out"]


def by_reference(call: dict[str, Any]) -> torch.Tensor:
    expected = {**call, "out": torch.zeros_like(call["out"])}
    paged_attention.implementations["reference"].function(**expected)
    return expected["out"]


@pytest.mark.parametrize("tokens", [1024, 1300])
def test_whole_prompts_are_attended_to(vendors, monkeypatch, tokens) -> None:
    from reprise.ops.paged_attention import prompt

    def wrong(*_: Any, **__: Any) -> None:
        raise AssertionError("left to Triton")

    monkeypatch.setattr(prompt, "bind_triton", wrong)
    call = arguments(vendors, tokens)
    expected = by_reference(call)
    torch.testing.assert_close(attended(vendors, call), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "others",
    [
        {"prompt": 0},
        {"sliding_window": 9},
        {"soft_cap": 3.0},
        {"dtype": torch.float32},
        {"head_size": 256},
        {"codes": True},
        {"tokens": 1023},
    ],
    ids=str,
)
def test_all_else_is_left_to_triton(vendors, monkeypatch, others) -> None:
    """A platform without such a kernel leaves everything to it."""
    from reprise.ops.paged_attention import prompt

    calls: list[Any] = []
    monkeypatch.setattr(prompt, "bind_triton", lambda *args, **_: calls.append(args))
    others = dict(others)
    tokens = others.pop("tokens", 1024)
    call = arguments(vendors, tokens)
    dtype, size = others.pop("dtype", None), others.pop("head_size", None)
    if dtype is not None:
        call |= {"query": call["query"].to(dtype)}
    if size is not None:
        call |= {"query": call["query"].new_zeros(tokens, 4, size)}
    if others.pop("codes", False):
        others |= {"key_scales": torch.zeros(3, 2, 16), "value_scales": torch.zeros(3, 2, 16)}
    attended(vendors, {**call, **others})
    assert len(calls) == 1


def test_nobody_gets_it_unasked(vendors) -> None:
    """It plans each length of a prompt anew, which costs the first one more than it gains."""
    for invariant in (False, True):
        found = OpTable(vendors, None, batch_invariant=invariant).candidates["paged_attention"]
        assert "prompt" not in [each.name for each in found]


def admission(row: int, start: int) -> Admission:
    return Admission(row, f"{row}", start, list(range(9000)), 9000, 9100, None, 0, frozenset())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "counts", "num_decodes", "admitted", "expected"),
    [
        ([4], [8000], 0, [admission(4, 0)], True),
        ([4], [1000], 0, [], False),  # its second chunk
        ([4], [500], 0, [admission(4, 160)], False),  # behind a prefix that the cache has
        ([4, 5], [700, 60], 0, [admission(4, 0), admission(5, 0)], False),
        ([3, 4], [1, 700], 1, [admission(4, 0)], False),
    ],
)  # fmt: skip
def test_a_step_is_a_prompt_if_nothing_else_is_in_it(
    rows, counts, num_decodes, admitted, expected
) -> None:
    step = Step(
        0, rows, counts, [0] * len(rows), [True] * len(rows), num_decodes, sum(counts), admitted
    )
    assert step.shape.prompt is expected

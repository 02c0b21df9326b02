"""Mixtures of experts against transformers; rows alone and beside others; padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reprise import ops

SIZES = {"hidden": 24, "inner": 8, "experts": 6, "top": 2}


Implementation = Callable[[Any, str], Callable[..., Any]]


@pytest.fixture(params=["reference", "torch", "triton"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def compute(name: str, implementation: Implementation) -> Callable[..., Any]:
    return implementation(ops.experts, name)


def made(rows: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weights, ids, gate_up and down."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, experts, top = SIZES.values()

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.stack([torch.randperm(experts, generator=generator)[:top] for _ in range(rows)])
    x, gate_up = randn(rows, hidden), randn(experts, 2 * inner, hidden) / 4
    down = randn(experts, hidden, inner) / 4
    weights = randn(rows, top).abs()
    found = [x.to(dtype), weights, ids.int(), gate_up.to(dtype), down.to(dtype)]
    return [each.to(device) for each in found]


@pytest.mark.parametrize("rows", [1, 19])
def test_as_transformers(
    compute: Callable[..., Any], name: str, implementation: Implementation, device: str, rows: int
) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    x, weights, ids, gate_up, down = made(rows, "cpu", rows)
    config = Qwen3MoeConfig(
        hidden_size=SIZES["hidden"], moe_intermediate_size=SIZES["inner"],
        num_experts=SIZES["experts"], num_experts_per_tok=SIZES["top"],
    )  # fmt: skip
    config._experts_implementation = "eager"
    oracle: Any = Qwen3MoeExperts(config)
    oracle.gate_up_proj.data, oracle.down_proj.data = gate_up, down
    with torch.no_grad():
        expected = oracle(x, ids.long(), weights)
    arguments = [each.to(device) for each in (x, weights, ids, gate_up, down)]
    assert torch.allclose(compute(*arguments).cpu(), expected, atol=1e-4)
    residual = torch.ones_like(arguments[0])
    implementation(ops.experts_add, name)(*arguments, residual)
    assert torch.allclose(residual.cpu(), expected + 1, atol=1e-4)


def test_rows_do_not_feel_each_other(compute: Callable[..., Any], device: str) -> None:
    """Not those of padding either, nor what they hold; nor in which order rows come."""
    x, weights, ids, gate_up, down = made(20, device)
    whole = compute(x, weights, ids, gate_up, down)
    for row in (0, 19):
        alone = slice(row, row + 1)
        single = compute(x[alone], weights[alone], ids[alone], gate_up, down)
        assert torch.allclose(single, whole[alone], atol=1e-5)
    odd, none = x.clone(), ids.clone()
    odd[1::2] = torch.nan
    none[1::2] = -1
    shares = weights.clone()
    shares[1::2] = torch.nan
    found = compute(odd, shares, none, gate_up, down)
    assert torch.allclose(found[::2], whole[::2], atol=1e-5)
    assert not found[1::2].count_nonzero()
    turned = compute(x.flip(0), weights.flip(0), ids.flip(0), gate_up, down).flip(0)
    assert torch.allclose(turned, whole, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 17, 66])
def test_a_crowd_at_one_expert(compute: Callable[..., Any], device: str, rows: int) -> None:
    """All rows go to the same two; no tile of an expert is the last."""
    x, weights, ids, gate_up, down = made(rows, device)
    ids[:] = torch.tensor([5, 2], device=device, dtype=torch.int32)
    hidden = x @ gate_up.transpose(1, 2)  # [E, T, 2 * I]
    gate, up = hidden.chunk(2, dim=-1)
    each = (torch.nn.functional.silu(gate) * up) @ down.transpose(1, 2)
    expected = weights[:, :1] * each[5] + weights[:, 1:] * each[2]
    assert torch.allclose(compute(x, weights, ids, gate_up, down), expected, atol=1e-4)


def test_narrow_numbers(
    compute: Callable[..., Any], device: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes[1:]:
        arguments = made(9, device, dtype=dtype)
        wide = [each.float() if each.is_floating_point() else each for each in arguments]
        expected = ops.experts(*wide)
        found = compute(*arguments)
        assert found.dtype is dtype
        assert float((found.float() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("at_once", [True, False])
def test_slots_sorted_by_expert(
    device: str, at_once: bool, monkeypatch: pytest.MonkeyPatch, implementation: Implementation
) -> None:
    """Each slot of an expert is in one tile of it, rows in their order, tiles one after another."""
    implementation(ops.experts, "triton")
    from reprise.ops.experts import groups

    if not at_once:
        monkeypatch.setattr(groups, "_MOST_AT_ONCE", 0)
        monkeypatch.setattr(groups, "_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    for rows, experts, size in ((1, 4, 16), (30, 3, 16), (9, 21, 32)):
        ids = torch.randint(-2, experts + 2, (rows, 3), generator=generator).int()
        ids[rows // 2 :, 0] = 1
        found = groups.sort_by_expert(ids.to(device), experts, size)
        slots, tiles = found.slots.tolist(), found.tiles.tolist()
        place = number = 0
        for expert in range(experts):
            mine = (ids.flatten() == expert).nonzero().flatten().tolist()
            assert slots[place : place + len(mine)] == mine
            for start in range(0, len(mine), size):
                assert [each[number] for each in tiles] == [
                    expert,
                    place + start,
                    place + len(mine),
                ]
                number += 1
            place += len(mine)
        assert found.count.tolist() == [number]
        assert number <= found.most


def test_no_routing_needs_more_tiles_than_there_may_be() -> None:
    from reprise.ops.experts.groups import most_tiles

    for slots, experts, rows in itertools.product((1, 7, 40, 200), (1, 5, 60), (16, 64)):
        # As many experts as can be with one row beyond full tiles, and all others at one of them.
        some = min(slots, experts)
        left = slots - some
        worst = some + left // rows
        assert most_tiles(slots, experts, rows) >= worst
        counts = [1 + left, *[1] * (some - 1)]
        assert most_tiles(slots, experts, rows) >= sum(-(-each // rows) for each in counts)

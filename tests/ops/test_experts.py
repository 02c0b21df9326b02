"""Mixtures of experts against transformers; rows alone and beside others; padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reprise import ops

SIZES = {"hidden": 32, "inner": 16, "experts": 6, "top": 2}


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


@pytest.mark.parametrize("rows", [1, 2, 7, 65])
def test_as_transformers(device: str, rows: int) -> None:
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
    assert torch.allclose(ops.experts(*arguments).cpu(), expected, atol=1e-4)
    residual = torch.ones_like(arguments[0])
    ops.experts_add(*arguments, residual)
    assert torch.allclose(residual.cpu(), expected + 1, atol=1e-4)


def test_rows_do_not_feel_each_other(device: str) -> None:
    """Not those of padding either, nor what they hold; nor in which order rows come."""
    x, weights, ids, gate_up, down = made(40, device)
    whole = ops.experts(x, weights, ids, gate_up, down)
    for row in (0, 17, 39):
        alone = slice(row, row + 1)
        single = ops.experts(x[alone], weights[alone], ids[alone], gate_up, down)
        assert torch.allclose(single, whole[alone], atol=1e-5)
    odd, none = x.clone(), ids.clone()
    odd[1::2] = torch.nan
    none[1::2] = -1
    shares = weights.clone()
    shares[1::2] = torch.nan
    found = ops.experts(odd, shares, none, gate_up, down)
    assert torch.allclose(found[::2], whole[::2], atol=1e-5)
    assert not found[1::2].count_nonzero()
    turned = ops.experts(x.flip(0), weights.flip(0), ids.flip(0), gate_up, down).flip(0)
    assert torch.allclose(turned, whole, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 130])
def test_a_crowd_at_one_expert(device: str, rows: int) -> None:
    """All rows go to the same two; no tile of an expert is the last."""
    x, weights, ids, gate_up, down = made(rows, device)
    ids[:] = torch.tensor([5, 2], device=device, dtype=torch.int32)
    hidden = x @ gate_up.transpose(1, 2)  # [E, T, 2 * I]
    gate, up = hidden.chunk(2, dim=-1)
    each = (torch.nn.functional.silu(gate) * up) @ down.transpose(1, 2)
    expected = weights[:, :1] * each[5] + weights[:, 1:] * each[2]
    assert torch.allclose(ops.experts(x, weights, ids, gate_up, down), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers(device: str, dtype: torch.dtype) -> None:
    arguments = made(9, device, dtype=dtype)
    wide = [each.float() if each.is_floating_point() else each for each in arguments]
    expected = ops.experts(*wide)
    found = ops.experts(*arguments)
    assert found.dtype is dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 1e-2

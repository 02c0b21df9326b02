"""Experts in eight bits: what a format's op computes is what its product computes one by one."""

from __future__ import annotations

import pytest
import torch

from reprise.layers import Build, Experts
from reprise.layers.formats import Format
from reprise.layers.formats.eight_bits import Blocks, Channels
from reprise.loading.destinations import destinations


class Same:
    """One format for everything."""

    def __init__(self, format: Format) -> None:
        self.format = format

    def of(self, path: str) -> Format:
        return self.format


@pytest.mark.parametrize(
    ("format", "hidden", "inner"),
    [
        (Blocks("weight_scale_inv", 128, 128), 256, 128),
        (Blocks("weight_scale_inv", 128, 128), 136, 72),  # gate and up share a block
        (Channels("weight_scale", whole=False), 64, 48),
        (Channels("weight_scale", whole=True), 64, 48),
    ],
)
def test_as_expert_by_expert(device: str, format: Format, hidden: int, inner: int) -> None:
    generator = torch.Generator(device=device).manual_seed(0)
    build = Build(torch.float32, torch.device(device), 16, Same(format), "experts")
    layer = Experts(build, 5, hidden, inner)
    for stack in (layer.gate_up_proj, layer.down_proj):
        stack.format.fill_at_random(stack.tensors, generator)
    x = torch.randn(9, hidden, generator=generator, device=device)
    weights = torch.rand(9, 2, generator=generator, device=device)
    first = torch.arange(9, device=device) % 5
    ids = torch.stack([first, (first + 2) % 5], dim=1).int()
    ids[7:] = -1
    stacks = layer.gate_up_proj.tensors, layer.down_proj.tensors
    expected = Format.grouped(layer.format, x, weights, ids, *stacks)
    assert float(expected[:7].abs().min(dim=1).values.max()) > 0
    torch.testing.assert_close(layer(x, weights, ids), expected)
    residual = torch.ones_like(x)
    layer.add(x, weights, ids, residual)
    torch.testing.assert_close(residual, expected + 1)
    names = set(destinations(layer))
    scale = format.scale
    assert {f"experts.4.{part}_proj.{scale}" for part in ("gate", "up", "down")} <= names

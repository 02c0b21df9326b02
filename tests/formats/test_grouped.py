"""Experts in eight bits: what a format's op computes is what its product computes one by one."""

from __future__ import annotations

import pytest
import torch

from reprise.cache import Batch
from reprise.layers import Build, Experts, Routing, SparseMLP, tensor
from reprise.layers.formats import DENSE, Dense, Format
from reprise.layers.formats.eight_bits import Blocks, Channels
from reprise.loading.destinations import destinations

OTHERS = ("seq_lens", "accepted", "known", "fresh", "tables", "query_len")
"""Of a batch, what no expert reads."""


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


class But:
    """Plain numbers everywhere, in one place as another format has them."""

    def __init__(self, path: str) -> None:
        self.path, self.other = path, Dense()

    def of(self, path: str) -> Format:
        return self.other if path == self.path else DENSE


@pytest.mark.parametrize("path", ["mlp.gate", "mlp.shared_expert_gate"])
def test_a_router_and_the_gate_beside_it_may_be_stored_in_different_formats(
    device: str, path: str
) -> None:
    """Then they are two products, of the same names, and the sum is the same."""
    generator = torch.Generator(device=device).manual_seed(0)
    made = []
    for formats in (But("nowhere"), But(path)):
        build = Build(torch.float32, torch.device(device), 16, formats, "mlp")
        made.append(SparseMLP(build, 24, 16, Routing(5, 2), shared_size=8))
    one, two = made
    assert one.shared_expert_gate is None
    assert two.shared_expert_gate is not None
    stored = {name: torch.randn(place[0].stored_shape, generator=generator, device=device)
              for name, place in destinations(one).items()}  # fmt: skip
    with torch.inference_mode():
        for layer in made:
            places = destinations(layer)
            assert places.keys() == stored.keys()
            for name, values in stored.items():
                for place in places[name]:
                    place.target.copy_(values[place.part])
        x = torch.randn(7, 24, generator=generator, device=device)
        ends = torch.tensor([0, 6], dtype=torch.int32, device=device)
        batch = Batch(*[None] * 3, query_start_loc=ends, **dict.fromkeys(OTHERS))
        # Products of other widths may add up in another order.
        torch.testing.assert_close(
            tensor(one(x, batch)), tensor(two(x, batch)), rtol=1e-5, atol=1e-5
        )

"""Every tensor that a model has from the start is known, wherever a layer keeps it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from helpers import TinyModels, make_llm
from torch import Tensor, nn

from reprise.cache import KEPT, LayerCache, Rows
from reprise.layers import SelfAttention
from reprise.runner.weights import weights_of


@dataclass
class Rotary:
    table: Tensor
    of: Any = None


@dataclass(slots=True)
class Slotted:
    table: Tensor


class Layer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()

        def some(*shape: int) -> Tensor:
            return torch.ones(*shape, device=device)

        whole = some(6, 4)
        self.first = nn.Parameter(whole[:2], requires_grad=False)
        self.register_buffer("whole", whole)
        self.second = whole[2:4]
        self.across = whole[:, 1]
        self.attribute = some(3)
        self.tables = (some(2), [some(5)], {"by name": some(7)})
        self.rotary = Rotary(some(8))
        self.rotary.of = self.rotary
        self.slotted = Slotted(some(10))
        self.kept = deque([MappingProxyType({"by name": some(12)}), {some(13)}])
        self.unknown = [nn.Linear(2, 7, device=device), self]
        self.counts = (some(9),)
        self.nothing = some(0)
        self.cache = LayerCache(KEPT, 0, key=Rows((2,), torch.float32))
        self.cache.tensors = {"key": some(11)}


def test_all_are_found_once(device: str) -> None:
    model = nn.Sequential(Layer(device))
    layer: Any = model[0]
    found = weights_of(model, layer.counts)
    # The view comes first, and has the same address as the whole.
    assert set(found) == {
        "0.first", "0.whole", "0.attribute", "0.tables.0", "0.tables.1.0", "0.tables.2.by name",
        "0.rotary.table", "0.slotted.table", "0.kept.0.by name", "0.kept.1.0",
        "0.unknown.0._parameters.weight", "0.unknown.0._parameters.bias",
    }  # fmt: skip
    assert found["0.whole"].shape == (6, 4)


def test_a_table_in_a_tuple_is_in_the_list_of_memory(
    tiny: TinyModels, device: str, monkeypatch: Any
) -> None:
    init = SelfAttention.__init__

    def with_table(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.further = (torch.ones(3, device=self.o_proj.weight.device),)

    monkeypatch.setattr(SelfAttention, "__init__", with_table)
    forward_pass = make_llm(tiny("qwen3"), device).engine.runner.forward_pass
    regions = {name: each for name, each in forward_pass.memory().items() if "further" in name}
    assert [each.owner for each in regions.values()] == ["weight"] * 2
    with torch.inference_mode():
        for each in regions.values():
            each.tensor.zero_()
        forward_pass.restore_tables()
    assert all(each.tensor.all() for each in regions.values())

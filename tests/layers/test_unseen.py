"""Layers whose ops may be put off: that nothing between the ops looks at a number, and that nobody
who does is told an old one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import generate, greedy, make_llm, random_ids, recorded_logits
from models.test_architectures import CASES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reprise.layers import Decoder, DecoderLayer, GatedMLP
from reprise.layers.unseen import Unseen
from reprise.ops.put_off import here

MADE_NEW = {"aten::empty_like", "aten::empty.memory_format", "aten::new_empty"}
PROMPTS = [random_ids(1, 1), random_ids(2, 37), random_ids(3, 17)]


def decoder_of(llm: Any) -> Decoder:
    return llm.engine.runner.model.model


class Between(TorchDispatchMode):
    """Gathers what is called in layers beside our ops, views of the first argument left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.called = False, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.inside and not func.name().startswith("reprise::"):
            views = isinstance(result, torch.Tensor) and not func._schema.is_mutable
            if not (views and result.untyped_storage()._cdata == storage(args[0])):
                self.called.add(func.name())
        return result


def storage(of: Any) -> int | None:
    return of.untyped_storage()._cdata if isinstance(of, torch.Tensor) else None


ARCHITECTURES = {(kind, name): fields for kind, name, fields in CASES}
SOME = sorted({kind: (kind, name) for kind, name, _ in CASES}.values())


@pytest.mark.parametrize(("kind", "name"), SOME, ids=lambda each: each.replace(" ", "_"))
def test_between_ops_there_are_views_alone(tiny, device, kind, name, monkeypatch):
    """Of every architecture of which it is believed; each with the fields that it has alone."""
    llm = make_llm(tiny(kind, **ARCHITECTURES[kind, name]), device)
    decoder = decoder_of(llm)
    if not decoder._unseen.now():
        pytest.skip("its ops are not put off")
    watch, forward = Between(), DecoderLayer.forward

    def in_layer(self, residual, batch):
        watch.inside = True
        forward(self, residual, batch)
        watch.inside = False

    monkeypatch.setattr(DecoderLayer, "forward", in_layer)
    with watch:
        generate(llm, PROMPTS, greedy(3))
    assert watch.called <= MADE_NEW


@pytest.mark.parametrize("kind", ["qwen3", "llama", "smollm3", "mistral", "qwen2"])
def test_logits_are_the_same_bits_either_way(tiny, device, kind, monkeypatch):
    llm = make_llm(tiny(kind), device, enable_prefix_caching=False)
    assert decoder_of(llm)._unseen.now()
    with recorded_logits(llm) as put_off:
        tokens = generate(llm, PROMPTS, greedy(12))
    monkeypatch.setattr(Unseen, "now", lambda self: False)
    with recorded_logits(llm) as at_once:
        assert generate(llm, PROMPTS, greedy(12)) == tokens
    for first, second in zip(put_off.values(), at_once.values(), strict=True):
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_a_hook_sees_what_has_been_computed(tiny, device):
    llm = make_llm(tiny("llama"), device)
    expected = generate(llm, PROMPTS, greedy(4))
    seen: list[torch.Tensor] = []
    layer = decoder_of(llm).layers[1]

    def look(module: Any, args: Any, result: Any) -> None:
        assert not here.open
        seen.append(args[0].values.clone())

    handle = layer.register_forward_hook(look)
    assert generate(llm, PROMPTS, greedy(4)) == expected
    handle.remove()
    assert seen
    assert all(each.isfinite().all() and each.any() for each in seen)
    assert decoder_of(llm)._unseen.now()


class Clamped(GatedMLP):
    def forward(self, x, batch):
        return torch.clamp(super().forward(x, batch).x, -1, 1)


class Reader(nn.Module):
    """May read what it is given, as a layer of somebody else's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, batch):
        return self.inner(x, batch)


def replaced(layer: DecoderLayer, monkeypatch: Any) -> None:
    layer.mlp = Reader(layer.mlp)


def replaced_within(layer: DecoderLayer, monkeypatch: Any) -> None:
    layer.mlp.down_proj = Reader(layer.mlp.down_proj)


def another_class(layer: DecoderLayer, monkeypatch: Any) -> None:
    layer.mlp.__class__ = Clamped


def forward_of_one(layer: DecoderLayer, monkeypatch: Any) -> None:
    layer.mlp.forward = layer.mlp.forward


def method_of_one(layer: DecoderLayer, monkeypatch: Any) -> None:
    layer.mlp.hidden = layer.mlp.hidden


def forward_of_all(layer: DecoderLayer, monkeypatch: Any) -> None:
    forward = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x, batch: forward(self, x, batch))


def hooked(layer: DecoderLayer, monkeypatch: Any) -> None:
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: None)


CHANGES = [
    replaced, replaced_within, another_class, forward_of_one, method_of_one, forward_of_all, hooked
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_what_is_not_known_is_not_believed(tiny, device, change, monkeypatch):
    """A subclass may do anything; so may what is put into a module's place, or a method's, before
    the first step or behind it."""
    decoder = decoder_of(make_llm(tiny("llama"), device))
    layers = list(decoder.layers)
    assert decoder._unseen.now()
    change(layers[1], monkeypatch)
    assert not decoder._unseen.now()
    assert not Unseen(layers).now()

"""Where stored tensors go: parts of them, to others, to two places at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import TinyModels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reprise import models
from reprise.errors import LoadError, ModelError
from reprise.layers import Build, CausalLM, Destination, Linear
from reprise.loading import load_weights, open_checkpoint, plan_update, update_weights
from reprise.loading.destinations import Misfits, by_our_names, destinations
from reprise.loading.weight_files import Stored
from reprise.platforms import Platform


class Share(nn.Module):
    """What one of two devices has of a product: half of its inputs, or of its outputs."""

    def __init__(self, linear: Linear, dim: int, rank: int) -> None:
        super().__init__()
        self.path, whole = linear.path, linear.tensors["weight"]
        self.shape = tuple(whole.shape)
        size = whole.shape[dim] // 2
        self.part = [slice(None), slice(None)]
        self.part[dim] = slice(rank * size, (rank + 1) * size)
        self.weight = nn.Parameter(torch.empty_like(whole[tuple(self.part)]), False)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        where = Destination(self.weight, tuple(self.part), self.shape)
        yield f"{self.path}.weight", where


class Elsewhere(nn.Module):
    """A product that another device has."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def destinations(self) -> Iterator[tuple[str, None]]:
        yield f"{self.path}.weight", None


def made(path: Path, platform: Platform) -> CausalLM:
    config = open_checkpoint(str(path)).config
    return models.build(config, Build(torch.float32, platform.device, 16))


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_of_stored_tensors(
    tiny: TinyModels, platform: Platform, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama").path
    model = made(path, platform)
    first, second = model.model.layers
    first.mlp.down_proj = Share(first.mlp.down_proj, 1, rank)
    second.self_attn.o_proj = Share(second.self_attn.o_proj, 0, rank)
    second.mlp.down_proj = Elsewhere(second.mlp.down_proj.path)
    read: list[tuple[slice, ...]] = []
    whole = Stored.read

    def noted(self: Stored, part: tuple[slice, ...] = ()) -> Tensor:
        read.append(part)
        return whole(self, part)

    monkeypatch.setattr(Stored, "read", noted)
    load_weights(model, path, "auto", platform)
    stored = load_file(path / "model.safetensors")
    assert len(read) == len(stored) - 1, "what lies elsewhere is not read"
    parts = [tuple(first.mlp.down_proj.part), tuple(second.self_attn.o_proj.part)]
    assert [each for each in read if each] == parts

    def check(factor: float) -> None:
        for name, places in destinations(model).items():
            for each in places:
                expected = stored[name][each.part] * factor
                assert torch.equal(each.target.cpu(), expected), name

    check(1)
    doubled = {name: 2 * each for name, each in stored.items()}
    update_weights(plan_update(model, doubled), platform)
    check(2)


def test_a_stored_tensor_that_is_larger_than_its_parts_together(
    tiny: TinyModels, platform: Platform
) -> None:
    """Its part is there, but it is another model's."""
    path = tiny("llama").path
    model = made(path, platform)
    layer = model.model.layers[0]
    layer.mlp.down_proj = Share(layer.mlp.down_proj, 1, 0)
    layer.mlp.down_proj.shape = (64, 48)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(LoadError, match="wrong shape") as caught:
        load_weights(model, path, "auto", platform)
    assert f"{name}: [64, 96] in the file, [64, 48] in the model" in str(caught.value)
    with pytest.raises(LoadError, match="wrong shape"):
        plan_update(model, {name: torch.zeros(64, 96)})


def test_what_is_elsewhere_need_not_be_stored_and_two_may_not_claim_the_same(
    tiny: TinyModels, platform: Platform
) -> None:
    path = tiny("llama").path
    model = made(path, platform)
    model.extra = Elsewhere("model.layers.7.mlp.down_proj")
    load_weights(model, path, "auto", platform)
    model.extra = Elsewhere("model.layers.1.mlp.down_proj")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is claimed"):
        load_weights(model, path, "auto", platform)


def test_tensors_that_are_one_in_the_model_and_differ_in_the_checkpoint(
    tiny: TinyModels, platform: Platform, tmp_path: Path
) -> None:
    """Only a head may have its own after all; of two layers one would get the other's."""
    path = Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))
    model = made(path, platform)
    first, second = model.model.layers
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    second.mlp.down_proj.tensors = first.mlp.down_proj.tensors
    with pytest.raises(LoadError, match="are one in the model") as caught:
        load_weights(model, path, "auto", platform)
    assert all(f"layers.{n}.mlp.down_proj.weight" in str(caught.value) for n in (0, 1))
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.{}.mlp.down_proj.weight"
    tensors[name.format(1)] = tensors[name.format(0)].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    load_weights(model, path, "auto", platform)
    assert torch.equal(second.mlp.down_proj.weight.cpu(), tensors[name.format(0)])


def test_prefixes() -> None:
    renames = {"a.": "", "a.b.": "c.", "d": "e"}
    misfits = Misfits("here", "there")
    found = by_our_names([("a.x", 1), ("a.b.x", 2), ("dog", 3), ("x.a.", 4)], renames, misfits)
    assert found == {"x": ("a.x", 1), "c.x": ("a.b.x", 2), "eog": ("dog", 3), "x.a.": ("x.a.", 4)}
    misfits.refuse("nothing")
    by_our_names([("x", 1), ("a.x", 2)], renames, misfits)
    with pytest.raises(LoadError, match=r"given twice \(1\): a.x"):
        misfits.refuse("no")


class Interleaved(nn.Module):
    """Has the even rows of a stored vector before its odd ones, each one larger."""

    def __init__(self, path: str, weight: Tensor) -> None:
        super().__init__()
        self.path, size = path, len(weight)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), False)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        size = len(self.weight)
        for row in range(size):
            place = row // 2 + row % 2 * size // 2
            target = self.weight[place : place + 1]
            where = Destination(target, (slice(row, row + 1),), (size,), offset=1.0)
            yield f"{self.path}.weight", where


def test_a_tensor_may_go_to_several_places_with_something_added(
    tiny: TinyModels, platform: Platform
) -> None:
    path = tiny("llama").path
    model = made(path, platform)
    name = "model.norm"
    model.model.norm = Interleaved(name, model.model.norm.weight)
    load_weights(model, path, "auto", platform)
    stored = load_file(path / "model.safetensors")[f"{name}.weight"]
    ordered = torch.cat((stored[::2], stored[1::2]))
    assert torch.equal(model.model.norm.weight.cpu(), ordered + 1)
    update_weights(plan_update(model, {f"{name}.weight": stored * 2}), platform)
    assert torch.equal(model.model.norm.weight.cpu(), ordered * 2 + 1)
    with pytest.raises(LoadError, match="wrong shape"):
        plan_update(model, {f"{name}.weight": torch.zeros(3)})

"""Stacks of experts: stored one by one or as one, with everything that is odd in one error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids, stacked_experts
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise import models
from reprise.errors import LoadError, ModelError
from reprise.layers import Build
from reprise.layers.formats import DENSE, Dense, Format
from reprise.loading import load_weights, open_checkpoint
from reprise.models import qwen3_moe
from reprise.platforms import Platform

LAYER = "model.layers.{}.mlp.experts"


@pytest.fixture
def stored(tiny: TinyModels, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    path = Path(shutil.copytree(tiny("qwen3_moe").path, tmp_path / "model"))
    return path, load_file(path / "model.safetensors")


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_one_by_one_or_as_one(
    stored: tuple[Path, dict[str, Tensor]], tiny: TinyModels, device: str
) -> None:
    path, tensors = stored
    together = stacked_experts(tensors)
    prompt = [random_ids(0, 9)]
    expected = generate(make_llm(tiny("qwen3_moe"), device), prompt, greedy(8))
    some = {name: each for name, each in tensors.items() if "layers.1" in name}
    rest = {name: each for name, each in together.items() if "layers.1" not in name}
    for each in (together, {**some, **rest}):
        save(path, each)
        llm = make_llm(path, device)
        assert generate(llm, prompt, greedy(8)) == expected
    # And so are they replaced.
    zero = {name: torch.zeros_like(each) for name, each in together.items() if "experts" in name}
    llm.update_weights(zero)
    assert generate(llm, prompt, greedy(8)) != expected
    llm.update_weights({name: each for name, each in tensors.items() if "experts" in name})
    assert generate(llm, prompt, greedy(8)) == expected


def test_all_that_is_odd_is_said_at_once(
    stored: tuple[Path, dict[str, Tensor]], device: str
) -> None:
    path, tensors = stored
    first, second = LAYER.format(0), LAYER.format(1)
    odd = dict(tensors)
    del odd[f"{first}.3.up_proj.weight"]
    odd[f"{first}.4.down_proj.weight"] = torch.zeros(64, 31)
    odd[f"{first}.8.down_proj.weight"] = torch.zeros(64, 32)
    odd[f"{second}.gate_up_proj"] = torch.zeros(8, 64, 64)
    odd[f"{second}.5.down_proj.weight"] = odd[f"{second}.5.down_proj.weight"].to(torch.int8)
    save(path, odd)
    with pytest.raises(LoadError) as caught:
        make_llm(path, device)
    text = str(caught.value)
    assert f"missing (1): {first}.3.up_proj.weight" in text
    assert f"{first}.4.down_proj.weight: [64, 31] in the file, [64, 32] in the model" in text
    # Of a layer that is stored as one, the pieces are too many.
    assert "unexpected (17)" in text
    assert f"{first}.8.down_proj.weight" in text
    assert f"{second}.7.up_proj.weight" in text
    assert f"{second}.5.down_proj.weight: int8" in text


def test_a_number_that_is_not_finite(stored: tuple[Path, dict[str, Tensor]], device: str) -> None:
    path, tensors = stored
    together = stacked_experts(tensors)
    name = f"{LAYER.format(1)}.gate_up_proj"
    together[name][5, 40, 7] = torch.nan
    save(path, together)
    with pytest.raises(LoadError, match=rf"{name} of .*: nan at \[5, 40, 7\]"):
        make_llm(path, device)


class Other(Dense):
    """A format of which a test makes another one than the plain one."""


class Some:
    """Formats that differ where ``path`` says."""

    def __init__(self, path: str) -> None:
        self.path, self.other = path, Other()

    def of(self, path: str) -> Format:
        return self.other if self.path in path else DENSE


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("experts.3.", "the experts of model.layers.0.mlp.experts"),
        ("experts.0.up_proj", "model.layers.0.mlp.experts.0.gate_proj, "),
        ("down_proj", "gate_proj, up_proj and down_proj"),
    ],
)
def test_what_is_computed_together_has_one_format(tiny: TinyModels, path: str, named: str) -> None:
    config = open_checkpoint(str(tiny("qwen3_moe").path)).config
    build = Build(torch.float32, torch.device("meta"), 16, Some(path))
    with pytest.raises(ModelError, match="formats, which is not supported") as caught:
        qwen3_moe.build(config, build)
    assert named in str(caught.value)


def test_random_weights_are_no_zeros(tiny: TinyModels, platform: Platform) -> None:
    """Of no expert: nobody would see one that is left as it was."""
    path = tiny("qwen3_moe").path
    config = open_checkpoint(str(path)).config
    model = models.build(config, Build(torch.float32, platform.device, 16))
    load_weights(model, path, "dummy", platform)
    for name, each in model.named_parameters():
        if "experts" in name:
            stds = each.flatten(1).std(dim=1)
            assert bool((stds > 0.01).all()), name
            assert bool((stds < 0.03).all()), name


@pytest.mark.parametrize("how", ["one by one", "as one", "random"])
def test_a_spoiled_expert_is_loaded_again(
    stored: tuple[Path, dict[str, Tensor]], device: str, how: str
) -> None:
    path, tensors = stored
    if how == "as one":
        save(path, stacked_experts(tensors))
    llm = make_llm(path, device, load_format="dummy" if how == "random" else "auto")
    computation = llm.engine.runner.forward_pass
    names = {name for name in computation.memory() if "experts" in name}
    assert names == {
        f"{LAYER.format(layer)}.{stack}_proj.weight"
        for layer in (0, 1)
        for stack in ("gate_up", "down")
    }
    name = f"{LAYER.format(1)}.down_proj.weight"
    weight = computation.memory()[name].tensor
    before = weight.clone()
    with torch.inference_mode():
        weight[5] += 1
        computation.mend([name])
    assert torch.equal(weight, before)

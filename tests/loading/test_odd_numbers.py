"""Weights that are NaN or infinite are refused by name and place, in every layout and way in."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HYBRIDS, TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from quantized import EIGHT_BITS, FOUR_BITS, quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise.errors import LoadError
from reprise.loading import odd_numbers
from reprise.loading import transfer as transfer_module
from reprise.loading.odd_numbers import find_odd
from reprise.loading.transfer import Copy, StagedLane
from reprise.platforms import Platform

CASES = [
    ("llama", None), ("qwen2", None), ("qwen3_moe", None), *((each, None) for each in HYBRIDS[:2]),
    *(("llama", each) for each in (*EIGHT_BITS, *FOUR_BITS)), ("qwen3_moe", "fp8-block"),
]  # fmt: skip
DOWN = "model.layers.1.mlp.down_proj.weight"


def spoil(tensors: dict[str, Tensor], names: Iterable[str], value: float = torch.nan) -> None:
    """A number of each, and another one behind it."""
    for name in names:
        odd = torch.tensor([value]).to(tensors[name].dtype)
        flat = tensors[name].view(-1).view(torch.uint8).view(-1, odd.element_size())
        for place in {len(flat) * 2 // 3, len(flat) - 1}:
            flat[place] = odd.view(torch.uint8)


def place_of(tensor: Tensor) -> list[int]:
    """Where :func:`spoil` put the first one."""
    place, index = tensor.numel() * 2 // 3, []
    for size in reversed(tensor.shape):
        index.append(place % size)
        place //= size
    return index[::-1]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_every_tensor_of_every_layout(
    tiny: TinyModels, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch,
    architecture: str, method: str | None,
) -> None:  # fmt: skip
    model = tiny(architecture)
    if method is not None:
        model = quantized(model, method)
    path = Path(shutil.copytree(model.path, tmp_path / "model"))
    file = path / "model.safetensors"
    tensors = load_file(file)
    names = [name for name, each in tensors.items() if each.is_floating_point()]
    spoil(tensors, names)
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(odd_numbers, "MOST", 1000)
    with pytest.raises(LoadError, match="fetch or save it again") as caught:
        make_llm(path, device)
    message = str(caught.value)
    for name in names:
        assert f"{name} of {file}: nan at {place_of(tensors[name])}" in message
    assert message.count("nan at") >= len(names)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("staged", [False, True])
def test_every_such_value(
    tiny: TinyModels, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, value: float,
    staged: bool,
) -> None:  # fmt: skip
    if staged:
        monkeypatch.setattr(transfer_module, "Lane", StagedLane)
    path = Path(shutil.copytree(tiny("qwen3").path, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    spoil(tensors, [DOWN], value)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=rf"{DOWN} of .*: {value} at \[42, 64\]"):
        make_llm(path, device)


def test_beyond_the_dtype_that_it_is_loaded_in(
    tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    path = Path(shutil.copytree(tiny("qwen3").path, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors[DOWN][3, 4] = 70000.0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"70000 at \[3, 4\] is beyond float16"):
        make_llm(path, device, dtype="float16")
    make_llm(path, device, dtype="bfloat16").shutdown()


@pytest.mark.parametrize("method", [None, "fp8-block", "awq"])
def test_new_weights(tiny: TinyModels, device: str, method: str | None) -> None:
    """Nothing is changed, and nothing is half-done."""
    old, new = (_made(tiny, method, seed) for seed in (0, 5))
    llm = make_llm(old, device)
    prompts = [random_ids(1, 20)]
    expected = generate(llm, prompts, greedy(8))
    tensors = load_file(new.path / "model.safetensors")
    scales = [each for each in tensors if "1.mlp.down_proj" in each and "scale" in each]
    name = scales[0] if scales else DOWN
    spoil(tensors, [name])
    spoil(tensors, ["model.norm.weight"], torch.inf)
    with pytest.raises(LoadError, match="nothing was changed") as caught:
        llm.update_weights(tensors)
    assert f"{name} of the new weights: nan at" in str(caught.value)
    assert "model.norm.weight of the new weights: inf at [42]" in str(caught.value)
    assert generate(llm, prompts, greedy(8)) == expected
    llm.update_weights(load_file(new.path / "model.safetensors"))
    assert generate(llm, prompts, greedy(8)) == generate(make_llm(new, device), prompts, greedy(8))


def _made(tiny: TinyModels, method: str | None, seed: int) -> TinyModel:
    model = tiny("llama", seed=seed)
    return model if method is None else quantized(model, method)


def test_new_weights_beyond_the_dtype(tiny: TinyModels, device: str) -> None:
    llm = make_llm(tiny("qwen3"), device, dtype="float16")
    with pytest.raises(LoadError, match=r"-1e\+30 at .* is beyond float16"):
        llm.update_weights({"model.norm.weight": torch.full((64,), -1e30)})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32], ids=str
)
def test_what_lies_on_the_device(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Is looked at there; on the CPU, as it would be."""
    whole = torch.arange(-64, 64).view(16, 8).to(dtype).to(platform.device)
    odd = whole.clone()
    if dtype.is_floating_point:
        odd.view(-1)[77:78] = torch.tensor([torch.nan]).to(dtype).to(platform.device)
    monkeypatch.setattr(odd_numbers, "all_finite", odd_numbers._finite_on_device)
    found: Any = find_odd([Copy("a", whole, whole), Copy("b", odd, odd)])
    assert [each.name for each in found] == (["b"] if dtype.is_floating_point else [])

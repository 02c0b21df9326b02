"""Checkpoints of a method that is not known are refused by its name, wherever it stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids
from safetensors.torch import load_file, save_file

from reprise.errors import LoadError, ModelError
from reprise.layers.formats import reader_of
from reprise.loading import open_checkpoint
from reprise.loading.quantization import with_quantization

CONFIGS: dict[str, dict[str, Any]] = {
    "hqq": {"quant_method": "hqq", "nbits": 4},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "NVFP4": {"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "no named method": {},
}


@pytest.fixture
def copy(tiny: TinyModels, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny("qwen3").path, tmp_path / "model"))


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("method", CONFIGS)
def test_config_of_a_method(copy: Path, device: str, method: str, load_format: str) -> None:
    change_config(copy, quantization_config=CONFIGS[method])
    with pytest.raises(ModelError, match="quantised") as caught:
        make_llm(copy, device, load_format=load_format)
    assert method in str(caught.value)
    assert "config field quantization_config" in str(caught.value)


def test_every_method_of_transformers(copy: Path) -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    unknown = {each for each in QuantizationMethod if reader_of(each.value) is None}
    assert {each.value for each in set(QuantizationMethod) - unknown} == {
        "awq", "compressed-tensors", "fp8", "gptq",
    }  # fmt: skip
    assert len(unknown) > 10
    for each in unknown:
        change_config(copy, quantization_config={"quant_method": each.value})
        with pytest.raises(ModelError, match=f"quantised with '{each.value}'"):
            open_checkpoint(str(copy))


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", ["gptq", 4, [], {"quant_method": 3}, {"bits": 4}])
def test_odd_configs(copy: Path, device: str, field: str, value: Any) -> None:
    change_config(copy, **{field: value})
    with pytest.raises(ModelError, match="quantised") as caught:
        make_llm(copy, device)
    assert field in str(caught.value)


def test_file_of_a_method(copy: Path, device: str) -> None:
    name = "hf_quant_config.json"
    (copy / name).write_text("{}")
    with pytest.raises(ModelError, match="quantised with 'modelopt'") as caught:
        make_llm(copy, device)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_odd_file_of_a_method(copy: Path, name: str) -> None:
    (copy / name).write_text("[]")
    with pytest.raises(ModelError, match=f"{name} is not valid"):
        open_checkpoint(str(copy))


def test_overrides(copy: Path, device: str) -> None:
    """They may say that a checkpoint is quantised, and that it is not; then its weights decide."""
    quantized = {"quantization_config": CONFIGS["mxfp4"]}
    with pytest.raises(ModelError, match="'mxfp4'"):
        make_llm(copy, device, hf_overrides=quantized)
    known = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(LoadError, match=r"up_proj\.qweight"):
        make_llm(copy, device, hf_overrides=known)
    prompt = random_ids(1, 9)
    plain = generate(make_llm(copy, device), [prompt], greedy(8))
    change_config(copy, **quantized)
    (copy / "quantize_config.json").write_text("{}")
    llm = make_llm(copy, device, hf_overrides={"quantization_config": None})
    assert generate(llm, [prompt], greedy(8)) == plain


def test_null_is_no_method(copy: Path, device: str) -> None:
    change_config(copy, quantization_config=None)
    make_llm(copy, device)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
    ],
)
def test_numbers_that_mean_nothing_alone(copy: Path, device: str, dtype: torch.dtype) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoadError, match="not plain floating-point numbers") as caught:
        make_llm(copy, device, hf_overrides={"quantization_config": None})
    assert f"{name}: {str(dtype).removeprefix('torch.')}" in str(caught.value)


def test_doubles_are_plain_numbers(copy: Path, device: str) -> None:
    prompt = random_ids(1, 9)
    expected = generate(make_llm(copy, device), [prompt], greedy(8))
    file = copy / "model.safetensors"
    save_file({k: v.double() for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert generate(make_llm(copy, device), [prompt], greedy(8)) == expected


def test_what_the_config_says_beside_it_is_part_of_it(tmp_path: Path) -> None:
    """Whatever version of transformers reads the rest."""
    method = {"quant_method": "fp8"}
    raw = {"expert_dtype": "fp8", "quantization_config": method}
    assert with_quantization(tmp_path, raw, {})["quantization_config"]["expert_dtype"] == "fp8"
    raw = {**raw, "quantization_config": {**method, "expert_dtype": "fp4"}}
    assert with_quantization(tmp_path, raw, {})["quantization_config"]["expert_dtype"] == "fp4"

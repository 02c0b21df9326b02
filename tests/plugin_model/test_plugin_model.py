"""A model and a format from a separate package, one file each, and the op of the format, one
folder. Entry points name the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, install_package, make_llm, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise.doctor.conformance.contract import Kit
from reprise.doctor.conformance.operations import matches_reference
from reprise.errors import LoadError, ModelError
from reprise.models import architectures
from reprise.ops import registry
from reprise.ops.cases import Maker
from reprise.platforms import Platform

METHOD = "int8_rows"
PROMPTS = [random_ids(seed, 3 + 13 * seed) for seed in range(4)]
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}  # fmt: skip
GRAPHS: dict[str, Any] = {
    "max_num_seqs": 4, "max_num_batched_tokens": 32, "graph_buckets": "decode=4;mixed=32",
    "graph_verify": "canary:2",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the package is. What it declares is gone afterwards; torch.library keeps the names."""
    path = tmp_path_factory.mktemp("site")
    install_package(Path(__file__).parent, path)
    before = dict(registry.declared)
    yield path
    registry.declared.clear()
    registry.declared.update(before)


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


def quantised(model: TinyModel, path: Path, *, plain: tuple[str, ...] = ()) -> TinyModel:
    """Stores the matrices of a model's layers in int8; returns the model that they stand for."""
    shutil.copytree(model.path, path / "int8")
    shutil.copytree(model.path, path / "meant")
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(model.path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.dim() == 1 or "embed" in name or module.rpartition(".")[2] in plain:
            stored[name] = meant[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        stored[name] = (weight / scale).round().to(torch.int8)
        stored[f"{module}.weight_scale"] = scale
        meant[name] = stored[name] * scale
    save_file(stored, path / "int8" / "model.safetensors", {"format": "pt"})
    save_file(meant, path / "meant" / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": METHOD, "modules_to_not_convert": list(plain)}
    change_config(path / "int8", quantization_config=quantization)
    return TinyModel(path / "meant")


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_not_installed(tiny: TinyModels, tmp_path: Path, device: str) -> None:
    assert "GraniteForCausalLM" not in architectures()
    with pytest.raises(ModelError, match="GraniteForCausalLM"):
        make_llm(tiny("granite", **GRANITE), device)
    quantised(tiny("llama"), tmp_path)
    with pytest.raises(ModelError, match=f"quantised with '{METHOD}'"):
        make_llm(tmp_path / "int8", device)


@pytest.mark.parametrize(
    ("decode", "mixed"),
    [("none", "full"), ("full", "breakable"), ("breakable", "none"), ("compiled", "none")],
)
def test_both_at_once_on_each_executor(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str, decode: str, mixed: str
) -> None:
    meant = quantised(tiny("granite", **GRANITE), tmp_path, plain=("lm_head",))
    llm = make_llm(tmp_path / "int8", device, **GRAPHS, graph_mode=f"decode={decode},mixed={mixed}")
    dtypes = {name: each.dtype for name, each in llm.engine.runner.model.named_parameters()}
    assert dtypes["model.layers.1.self_attn.qkv_proj.weight"] == torch.int8
    assert dtypes["lm_head.weight"] == torch.float32
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS, greedy(12)), strict=True):
        assert meant.is_greedy(prompt, output)
    report = llm.graph_report()
    assert report.plan == {"decode": decode, "mixed": mixed}
    assert all(each.verified and each.quarantined is None for each in report.graphs)
    assert report.canary_failures == 0
    assert report.replays > 0


def test_the_model_with_plain_weights(installed: None, tiny: TinyModels, device: str) -> None:
    model = tiny("granite", tie_word_embeddings=True, **GRANITE)
    for prompt, output in zip(
        PROMPTS, generate(make_llm(model, device), PROMPTS, greedy(12)), strict=True
    ):
        assert model.is_greedy(prompt, output)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_format_in_other_models(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str, architecture: str
) -> None:
    meant = quantised(tiny(architecture), tmp_path)
    llm = make_llm(tmp_path / "int8", device)
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS, greedy(8)), strict=True):
        assert meant.is_greedy(prompt, output)
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    llm.update_weights(weights)
    assert meant.is_greedy(PROMPTS[1], generate(llm, PROMPTS, greedy(8))[1])
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong in (weights[name].float(), weights[name].to(torch.uint8)):
        with pytest.raises(LoadError, match=f"wrong dtype .1.: {name}: {wrong.dtype}"):
            llm.update_weights({name: wrong})


def test_dummy_weights_of_the_format(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    quantised(tiny("llama"), tmp_path)
    llm = make_llm(tmp_path / "int8", device, load_format="dummy")
    assert len(generate(llm, PROMPTS, greedy(8))[0]) == 8
    weight = dict(llm.engine.runner.model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert weight.dtype == torch.int8
    assert len(weight.unique()) > 200


def test_what_the_format_does_not_know_is_refused(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    quantised(tiny("llama"), tmp_path)
    change_config(tmp_path / "int8", quantization_config={"quant_method": METHOD, "bits": 4})
    with pytest.raises(ModelError, match="quantization_config has bits"):
        make_llm(tmp_path / "int8", device)


def test_parts_of_one_product_in_different_formats(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    quantised(tiny("llama"), tmp_path, plain=("k_proj",))
    with pytest.raises(ModelError, match="different formats") as caught:
        make_llm(tmp_path / "int8", device)
    assert "model.layers.0.self_attn.k_proj" in str(caught.value)


def test_numbers_of_another_dtype_than_the_format_has(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    """Plain numbers are not converted to what has scales, nor a scale's absence overlooked."""
    quantised(tiny("llama"), tmp_path)
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    up, down = (f"model.layers.1.mlp.{each}_proj.weight" for each in ("up", "down"))
    tensors[up] = tensors[up].to(torch.bfloat16)
    del tensors[f"{down}_scale"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoadError) as caught:
        make_llm(tmp_path / "int8", device)
    assert f"wrong dtype (1): {up}: bfloat16 in the file, int8 in the model" in str(caught.value)
    assert f"missing (1): {down}_scale" in str(caught.value)


def test_prefixes_that_the_models_file_lists(
    installed: None, tiny: TinyModels, tmp_path: Path, device: str
) -> None:
    model = tiny("granite", **GRANITE)
    expected = generate(make_llm(model, device), PROMPTS, greedy(8))
    path = Path(shutil.copytree(model.path, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    moved = {f"language_model.{name}": each for name, each in tensors.items()}
    save_file(moved, path / "model.safetensors", {"format": "pt"})
    llm = make_llm(path, device)
    assert generate(llm, PROMPTS, greedy(8)) == expected
    llm.update_weights(moved)
    assert generate(llm, PROMPTS, greedy(8)) == expected
    norm = "model.norm.weight"
    with pytest.raises(LoadError, match=r"given twice \(1\): model.norm.weight"):
        llm.update_weights({**moved, norm: tensors[norm]})
    save_file({**moved, norm: tensors[norm] + 1}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match="given twice"):
        make_llm(path, device)


def test_the_op_of_the_format(
    installed: None, tiny: TinyModels, tmp_path: Path, platform: Platform, device: str
) -> None:
    """Its cases compare it as they do ours, and it is chosen like ours."""
    meant = quantised(tiny("llama"), tmp_path)
    llm = make_llm(tmp_path / "int8", device, ops={"int8_linear": "scaled"})
    assert llm.engine.runner.ops.chosen["int8_linear"].name == "scaled"
    assert meant.is_greedy(PROMPTS[2], generate(llm, PROMPTS, greedy(8))[2])
    op = registry.all_ops()["int8_linear"]
    assert "scaled" in matches_reference(Kit(platform, device), op)
    for arguments in op.cases.small(Maker(platform.device, torch.float32)):
        torch.library.opcheck(op.overload, tuple(arguments[name] for name in op.arguments))

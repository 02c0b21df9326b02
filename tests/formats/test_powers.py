"""Checkpoints as DeepSeek-V4 is released: its names, scales as exponents, experts of four bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek import as_released
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids, recorded_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise.errors import LoadError, ModelError
from reprise.ops.fp8_linear.reference import dequantise as of_blocks
from reprise.ops.mxfp4_experts.reference import dequantise, powers

SHAPED: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 128,
    "num_attention_heads": 4, "qk_rope_head_dim": 32, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 128, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1,
    "n_routed_experts": 4, "index_head_dim": 32,
}  # fmt: skip
"""Of sizes that blocks divide, a layer of each kind."""


@pytest.fixture(scope="module")
def plain(tiny: TinyModels) -> TinyModel:
    return tiny("deepseek_v4", **SHAPED)


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def released(
    request: pytest.FixtureRequest, plain: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TinyModel]:
    """The checkpoint, and what its numbers stand for."""
    root = tmp_path_factory.mktemp(request.param)
    meant = as_released(plain.path, root / "released", root / "meant", experts=request.param)
    return root / "released", TinyModel(meant)


def test_every_exponent_is_the_number_that_torch_takes_it_for() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    expected = every.view(torch.float8_e8m0fnu).float()
    assert torch.equal(powers(every).nan_to_num(-1.0), expected.nan_to_num(-1.0))


def test_four_bits_are_two_columns_the_even_one_first() -> None:
    codes = torch.tensor([[0x2B, *[0] * 15]], dtype=torch.uint8).view(torch.int8)
    found = dequantise(codes, torch.tensor([[128]], dtype=torch.uint8))
    assert found[0, :3].tolist() == [-3.0, 2.0, 0.0]


def test_weights_are_what_the_checkpoint_means(
    released: tuple[Path, TinyModel], device: str
) -> None:
    """To the bit, in every product and expert."""
    path, meant = released
    llm = make_llm(path, device)
    reference = meant.reference.state_dict()
    layers: Any = llm.engine.runner.model.model.layers
    for number, layer in enumerate(layers):

        def of(name: str, number: int = number) -> Tensor:
            return reference[f"model.layers.{number}.{name}.weight"]

        attention = layer.attn
        expected = torch.cat((of("self_attn.q_a_proj"), of("self_attn.kv_proj")))
        assert torch.equal(_numbers(attention.down), expected)
        assert torch.equal(_numbers(attention.wo_a), of("self_attn.o_a_proj"))
        assert torch.equal(_numbers(attention.wo_b), of("self_attn.o_b_proj"))
        assert torch.equal(_numbers(layer.ffn.shared_experts.down_proj),
                           of("mlp.shared_experts.down_proj"))  # fmt: skip
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.ffn.experts, name)
            expected = reference[f"model.layers.{number}.mlp.experts.{name}"]
            assert torch.equal(_numbers(stack), expected)


def _numbers(product: Any) -> Tensor:
    weight, scale = product.tensors["weight"].cpu(), product.tensors["scale"].cpu()
    if weight.dtype is torch.int8:
        return dequantise(weight, scale)
    return of_blocks(weight, scale, *product.format.blocks(0))


def test_logits_are_near_those_of_what_is_meant(
    released: tuple[Path, TinyModel], device: str
) -> None:
    """Activations are quantised on the way, and a layer may choose other experts for it."""
    path, meant = released
    llm = make_llm(path, device)
    prompt = random_ids(5, 40)
    with recorded_logits(llm) as seen:
        generate(llm, [prompt], greedy(1))
    found, expected = next(iter(seen.values()))[0], meant.logits(prompt)[-1]
    assert float(torch.corrcoef(torch.stack((found, expected)))[0, 1]) > 0.9


def test_random_weights_of_these_formats_are_finite(
    released: tuple[Path, TinyModel], device: str
) -> None:
    llm = make_llm(released[0], device, load_format="dummy")
    assert len(generate(llm, [random_ids(1, 9)], greedy(3))[0]) == 3


def test_an_exponent_that_is_no_number_is_refused(
    released: tuple[Path, TinyModel], device: str, tmp_path: Path
) -> None:
    tensors = load_file(released[0] / "model.safetensors")
    name = "layers.0.ffn.experts.1.w2.scale"
    tensors[name] = tensors[name].view(torch.uint8).fill_(255).view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((released[0] / "config.json").read_text())
    with pytest.raises(LoadError, match=r"layers\.0\.ffn\.experts\.1\.w2\.scale"):
        make_llm(tmp_path, device)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "modelopt"),
        ({"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"]}, "V41"),
        ({"model_type": "deepseek_v41"}, "deepseek_v41"),
        ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0",
          "weight_block_size": [128, 128], "expert_dtype": "nvfp4"}}, "expert_dtype='nvfp4'"),
    ],
)  # fmt: skip
def test_relatives_are_refused_by_name(
    plain: TinyModel, device: str, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    config = json.loads((plain.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=named):
        make_llm(tmp_path, device, load_format="dummy")

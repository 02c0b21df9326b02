"""The language model of a checkpoint that also reads images: what is read and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids
from safetensors.torch import load_file, save_file

from reprise.errors import ConfigError, ModelError
from reprise.loading import open_checkpoint, plan_update

YARN = {
    "mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "yarn", "rope_theta": 1e7,
    "partial_rotary_factor": 0.25, "factor": 4.0, "original_max_position_embeddings": 512,
}  # fmt: skip


def changed(model: Path, target: Path, change: dict[str, Any], prefix: str = "") -> Path:
    """The checkpoint with other fields, and its tensors under another prefix and beside others."""
    config = json.loads((model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **change}))
    tensors = load_file(model / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", prefix) if prefix else name: each
        for name, each in tensors.items()
    }
    renamed["mtp.fc.weight"] = torch.zeros(3, 3)
    save_file(renamed, target / "model.safetensors", {"format": "pt"})
    return target


def test_what_is_beside_is_said_and_not_read(
    tiny: TinyModels, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("qwen3_5_vl")
    prompt = random_ids(3, 40)
    expected = generate(make_llm(model, device), [prompt], greedy(8))
    assert model.is_greedy(prompt, expected[0])
    prefixes = ("", "language_model.", "language_model.model.", "model.")
    for number, prefix in enumerate(prefixes):
        path = tmp_path / f"{number}"
        path.mkdir()
        caplog.clear()
        with caplog.at_level("INFO"):
            llm = make_llm(changed(model.path, path, {}, prefix), device)
        assert generate(llm, [prompt], greedy(8)) == expected
        told = [each.message for each in caplog.records]
        assert any("images and videos are not read (vision_config)" in each for each in told)
        assert any("model.visual., mtp. are not read" in each for each in told)
    inner = llm.engine.runner.model
    assert not plan_update(inner, {"mtp.fc.weight": torch.zeros(3, 3)})


def test_fields_outside_count_for_the_language_model(tiny: TinyModels, tmp_path: Path) -> None:
    path = tiny("qwen3_5_vl").path
    ignored = ["model.language_model.layers.0.linear_attn.in_proj_a",
               r"re:model\.language_model\.layers\..*gate"]  # fmt: skip
    config = changed(path, tmp_path, {"eos_token_id": 7, "tie_word_embeddings": True})
    assert open_checkpoint(str(config)).config.eos_token_id == 7
    from reprise.loading.text_part import text_part

    given = json.loads((config / "config.json").read_text())
    part, _ = text_part({**given, "quantization_config": {"ignore": ignored}}, {})
    assert part["quantization_config"]["ignore"] == [
        "model.layers.0.linear_attn.in_proj_a", r"re:model\.layers\..*gate"
    ]  # fmt: skip
    assert part["tie_word_embeddings"] is True


def test_overrides_may_stand_within_text_config_or_not(tiny: TinyModels) -> None:
    path = str(tiny("qwen3_5_vl").path)
    for overrides in ({"num_hidden_layers": 3}, {"text_config": {"num_hidden_layers": 3}}):
        config = open_checkpoint(path, overrides=overrides).config
        assert config.num_hidden_layers == len(config.layer_types) == 3
    for overrides in ({"rope_parameters": YARN}, {"text_config": {"rope_parameters": YARN}}):
        assert open_checkpoint(path, overrides=overrides).config.rope_parameters == YARN
    refused = {
        "vision_config": {"depth": 2}, "text_config": 3, "image_token": 4,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ConfigError, match=name):
            open_checkpoint(path, overrides={name: value})


def test_a_config_without_a_language_model_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    for text in (None, {}, 3):
        config = changed(tiny("qwen3_5_vl").path, tmp_path, {"text_config": text})
        with pytest.raises(ModelError, match="text_config="):
            open_checkpoint(str(config))


def test_the_whole_under_the_name_of_its_language_model_is_refused(
    tiny: TinyModels, tmp_path: Path
) -> None:
    whole = json.loads((tiny("qwen3_5_vl").path / "config.json").read_text())
    for name in ("Qwen3_5ForCausalLM", "LlamaForCausalLM"):
        (tmp_path / "config.json").write_text(json.dumps({**whole, "architectures": [name]}))
        with pytest.raises(ModelError, match=f"{name}.*text_config contradict each other"):
            open_checkpoint(str(tmp_path), config_only=True)
    remedy = {"architectures": whole["architectures"]}
    assert open_checkpoint(str(tmp_path), overrides=remedy, config_only=True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid'"),
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16'"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads=5"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim=1"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim=0"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "'sliding_attention'"),
        ({"rope_parameters": {**YARN, "mrope_section": [9]}}, "mrope_section=[9]"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_what_is_not_computed_is_refused(
    tiny: TinyModels, tmp_path: Path, device: str, fields: dict[str, Any], named: str
) -> None:
    path = tiny("qwen3_5_vl").path
    text = json.loads((path / "config.json").read_text())["text_config"]
    config = changed(path, tmp_path, {"text_config": {**text, **fields}})
    with pytest.raises(ModelError) as caught:
        make_llm(config, device)
    assert named in str(caught.value)

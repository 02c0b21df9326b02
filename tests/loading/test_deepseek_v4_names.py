"""DeepSeek-V4 under every name that its tensors have had; and what does not fit, by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TinyModel, TinyModels
from next_streams import NextLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reprise import models
from reprise.errors import LoadError
from reprise.layers import Build
from reprise.loading import open_checkpoint
from reprise.loading.weights import load_weights
from reprise.platforms import Platform

Tensors = dict[str, Tensor]
Loader = Callable[[Tensors], Tensors]


@pytest.fixture
def checkpoint(tiny: TinyModels, tmp_path: Path) -> TinyModel:
    """With the layer that drafts."""
    return NextLayer(tiny, tmp_path / "written").model


@pytest.fixture
def loaded(checkpoint: TinyModel, tmp_path: Path, platform: Platform) -> Loader:
    """``loaded(tensors)``: all parameters of the target and of the layer that drafts, from a
    checkpoint of these."""
    (tmp_path / "config.json").write_text((checkpoint.path / "config.json").read_text())
    config = open_checkpoint(str(tmp_path), config_only=True).config
    build = Build(torch.float32, platform.device, 64)

    def load(tensors: Tensors) -> Tensors:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        target = models.build(config, build)
        head = models.build_mtp(config, build, target)
        for each in (target, head):
            load_weights(each, tmp_path, "auto", platform)
        return {**state(target), **state(head)}

    return load


def state(model: nn.Module) -> Tensors:
    return {name: each.cpu() for name, each in model.state_dict().items()}


def released(name: str) -> str:
    """From what transformers writes."""
    name = name.removeprefix("model.").replace("embed_tokens", "embed")
    return name.replace("attn.norm.", "attn.kv_norm.").replace("hc_head.hc_", "hc_head_")


def as_modules(tensors: Tensors, model: TinyModel) -> Tensors:
    """Names of transformers' modules; those of the layer that drafts are of a layer like it."""
    found = {name: each.clone() for name, each in model.reference.state_dict().items()}
    found = {name: each for name, each in found.items() if "inv_freq" not in name}
    modules = {
        "attn.wq_a": "self_attn.q_a_proj", "attn.wq_b": "self_attn.q_b_proj",
        "attn.wkv": "self_attn.kv_proj", "attn.kv_norm": "self_attn.kv_norm",
        "attn.q_norm": "self_attn.q_a_norm", "attn.wo_a": "self_attn.o_a_proj",
        "attn.wo_b": "self_attn.o_b_proj", "attn.attn_sink": "self_attn.sinks",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "hc_attn_": "attn_hc.", "hc_ffn_": "ffn_hc.", "hc_head_": "hc_head.hc_",
        "ffn.gate.bias": "mlp.gate.e_score_correction_bias", "ffn.gate.weight": "mlp.gate.weight",
        "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
        "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
        "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    }  # fmt: skip
    experts: dict[tuple[int, str], Tensor] = {}
    for name, each in tensors.items():
        rest = name.removeprefix("mtp.0.")
        if rest == name:
            continue
        if rest.startswith("ffn.experts."):
            _, _, number, kind, _ = rest.split(".")
            experts[int(number), kind] = each
            continue
        theirs = next((ours for ours in modules if rest.startswith(ours)), None)
        found["mtp.0." + (rest if theirs is None else rest.replace(theirs, modules[theirs]))] = each
    numbers = sorted({number for number, _ in experts})
    path = "mtp.0.mlp.experts"
    found[f"{path}.down_proj"] = torch.stack([experts[number, "w2"] for number in numbers])
    found[f"{path}.gate_up_proj"] = torch.stack(
        [torch.cat((experts[number, "w1"], experts[number, "w3"])) for number in numbers]
    )
    return found


def test_all_names_are_the_same_model(checkpoint: TinyModel, loaded: Loader) -> None:
    written = load_file(checkpoint.path / "model.safetensors")
    expected = loaded(written)
    assert any(name.startswith("mtp.0.attn") for name in expected)
    forms = {
        "released": {released(name): each for name, each in written.items()},
        "modules": as_modules(written, checkpoint),
    }
    assert "layers.0.attn.kv_norm.weight" in forms["released"]
    assert "model.layers.0.self_attn.compressor.position_bias" in forms["modules"]
    for form, tensors in forms.items():
        found = loaded(tensors)
        assert found.keys() == expected.keys()
        for name, each in found.items():
            assert torch.equal(each, expected[name]), f"{form}: {name}"


def test_embedding_and_head_of_the_layer_that_drafts_are_the_targets(
    checkpoint: TinyModel, loaded: Loader
) -> None:
    """Some releases have them twice."""
    written = load_file(checkpoint.path / "model.safetensors")
    expected = loaded(written)
    written["mtp.0.emb.tok_emb.weight"] = torch.full((4, 4), 7.0)
    written["mtp.0.head.weight"] = torch.full((4, 4), 7.0)
    found = loaded(written)
    assert all(torch.equal(each, expected[name]) for name, each in found.items())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.attn.compressor.ape",
        "model.layers.0.attn.attn_sink",
        "model.layers.1.ffn.gate.bias",
        "model.layers.0.ffn.gate.tid2eid",
        "model.layers.0.hc_attn_fn",
        "mtp.0.e_proj.weight",
        "mtp.0.ffn.experts.3.w2.weight",
    ],
)
def test_what_is_missing_or_misshapen_is_named(
    checkpoint: TinyModel, loaded: Loader, name: str
) -> None:
    written = load_file(checkpoint.path / "model.safetensors")
    tensor = written.pop(name)
    with pytest.raises(LoadError, match=f"(?s)missing.*{name}"):
        loaded(written)
    with pytest.raises(LoadError, match=f"(?s)shape.*{name}"):
        loaded({**written, name: torch.cat((tensor, tensor))})


def test_what_no_layer_has_is_named(checkpoint: TinyModel, loaded: Loader) -> None:
    """In the target, and in the layer that drafts."""
    written = load_file(checkpoint.path / "model.safetensors")
    for name in ("model.layers.0.attn.attn_sinks", "mtp.0.attn.compressor.ape"):
        with pytest.raises(LoadError, match=f"(?s)unexpected.*{name}"):
            loaded({**written, name: torch.ones(8)})


@pytest.mark.parametrize("expert", [-1, 8])
def test_a_table_of_experts_that_are_none_is_refused(
    checkpoint: TinyModel, loaded: Loader, expert: int
) -> None:
    written = load_file(checkpoint.path / "model.safetensors")
    written["model.layers.0.ffn.gate.tid2eid"][17, 1] = expert
    with pytest.raises(LoadError, match=r"layers\.0\.ffn\.gate\.tid2eid.*of 8: the table"):
        loaded(written)

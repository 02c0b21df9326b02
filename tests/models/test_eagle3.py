"""EAGLE-3 heads as they are stored, against a head in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_heads import EACH, JOINT, oracle, write_head
from head_steps import HeadSteps
from helpers import TinyModel, TinyModels, random_ids
from safetensors.torch import load_file, save_file

from reprise import models
from reprise.errors import LoadError, ModelError
from reprise.layers import Build, CausalLM
from reprise.loading import open_checkpoint
from reprise.loading.draft_head import Target, load_head, read_head
from reprise.loading.weights import load_weights
from reprise.platforms import Platform

LENGTH, CHAIN = 21, 4
ROPE = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "SpecForge": {},
    "SafeAILab, whole vocabulary": {"draft_vocab": None, "prefix": "model."},
    "speculators": {"form": "speculators", "first": "layers.0."},
    "speculators, norm before residual": {
        "form": "speculators", "first": "layers.0.", "norm_before_residual": True,
    },
    "feedback behind the norm": {"norm_output": True},
    "each state normalised": EACH,
    "states normalised as one": JOINT,
    "normalised heads": {"kind": "qwen3"},
    "own embedding": {"own_embedding": True},
    "narrow": {"own_embedding": True, "hidden_size": 48},
    "two layers": {"num_layers": 2},
    "the model's last product": {"draft_vocab": None, "own_head": False},
    "own embedding, tied": {
        "draft_vocab": None, "own_head": False, "own_embedding": True, "tie_word_embeddings": True,
    },
    "other RoPE": {"layer_fields": {"rope_theta": 5000.0, "rope_scaling": ROPE}},
    "biases": {"layer_fields": {"attention_bias": True}},
    "other depths": {"depths": (0, 3)},
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3", num_hidden_layers=4)


def make_target(model: TinyModel, platform: Platform) -> tuple[CausalLM, Build]:
    build = Build(torch.float32, platform.device, 256)
    made = models.build(open_checkpoint(str(model.path)).config, build)
    load_weights(made, model.path, "auto", platform)
    return made, build


@pytest.fixture(scope="module")
def loaded(target: TinyModel, platform: Platform) -> tuple[CausalLM, Build]:
    return make_target(target, platform)


@pytest.mark.parametrize(
    ("architecture", "form"),
    [*(("qwen3", each) for each in FORMS), ("llama", "SpecForge"), ("llama", "own embedding")],
)
def test_head_is_the_one_in_plain_torch(
    tiny: TinyModels, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build],
    architecture: str, form: str,
) -> None:  # fmt: skip
    """Over a prompt, and along a chain behind it."""
    model = tiny(architecture, num_hidden_layers=4)
    made, build = loaded if architecture == "qwen3" else make_target(model, platform)
    path = write_head(tmp_path / "head", model, **FORMS[form])
    with torch.inference_mode():
        head = load_head(path, made, build, platform)
    right = oracle().read_head(path, model.reference)
    text = random_ids(3, LENGTH)
    numbers = torch.Generator().manual_seed(1)
    aux = torch.randn(LENGTH - 1, len(head.taps), 64, generator=numbers)
    assert head.taps == right.config.aux_layers

    steps = HeadSteps(head, platform, LENGTH)
    with torch.inference_mode(), steps.ops.activate():
        hidden = head.prepare(aux.flatten(1).to(platform.device))
    expected = right.combine(aux[None])
    torch.testing.assert_close(hidden.cpu(), expected[0], rtol=1e-4, atol=1e-4)
    memory, following = right.new_memory(), torch.tensor([text[1:]])
    tokens, begin = text[1:], 0
    for step in range(CHAIN):
        hidden, logits = steps(begin, tokens, hidden)
        expected, their_logits = right.step(expected, following, step, memory, None)
        rows = slice(None) if step == 0 else slice(-1, None)
        torch.testing.assert_close(hidden, expected[0, rows], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits, their_logits[0, rows], rtol=1e-3, atol=1e-3)
        # All rows of the oracle go on with their own drafts, ours behind the last row.
        following = right.target_ids[their_logits[0].argmax(-1)][None]
        drafted = head.token_ids(logits[-1:].argmax(-1).to(platform.device)).tolist()
        assert drafted == following[0, -1:].tolist()
        hidden, tokens, begin = hidden[-1:], drafted, LENGTH - 1 + step


IDS = "eagle_aux_hidden_state_layer_ids"
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (LoadError, "missing.*layers.0.self_attn.q_proj.weight",
     {"leave_out": ["midlayer.self_attn.q_proj.weight"]}),
    (LoadError, "missing.*fc.weight", {"leave_out": ["fc.weight"]}),
    (LoadError, "missing.*: norm.weight", {"leave_out": ["norm.weight"]}),
    (LoadError, "missing.*hidden_norm", {"leave_out": ["midlayer.hidden_norm.weight"]}),
    (LoadError, "missing.*d2t", {"leave_out": ["d2t"]}),
    (LoadError, "missing.*fc_norm.1.weight", {**EACH, "leave_out": ["fc_norm.1.weight"]}),
    (LoadError, "missing.*input_norm.weight", {**JOINT, "leave_out": ["input_norm.weight"]}),
    (LoadError, "unexpected.*input_norm.weight", {"stored_too": "input_norm.weight"}),
    (LoadError, "lacks lm_head.weight.*needs .100, 64.", {"own_head": False}),
    (LoadError, "lacks embed_tokens.weight", {"hidden_size": 48}),
    (LoadError, "wrong shape.*fc.weight.*\\[64, 192\\] in the file, \\[64, 128\\]",
     {"depths": None, IDS: [1, 2]}),
    (LoadError, "wrong shape.*lm_head.weight", {"draft_vocab_size": 99}),
    (ModelError, "speculators_model_type='peagle'",
     {"form": "speculators", "speculators_model_type": "peagle"}),
    (ModelError, "model_type='qwen2'", {"kind": "qwen2"}),
    (ModelError, "vocab_size=150 is not the model's, 160", {"layer_fields": {"vocab_size": 150}}),
    (ModelError, "target_hidden_size=32", {"target_hidden_size": 32}),
    (ModelError, "draft_vocab_size=161", {"draft_vocab_size": 161}),
    (ModelError, "draft_vocab_size='many'", {"draft_vocab_size": "many"}),
    (ModelError, "exclude each other", {**EACH, **JOINT}),
    (ModelError, "norm_output='yes'", {"norm_output": "yes"}),
    (ModelError, "hidden_act='gelu'", {"layer_fields": {"hidden_act": "gelu"}}),
    (ModelError, "quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
    (ModelError, "parallel_drafting=True", {"parallel_drafting": True}),
    (ModelError, "use_aux_hidden_state=False",
     {"depths": None, "eagle_config": {"use_aux_hidden_state": False}}),
    (ModelError, "eagle_config has rope_of_eagles",
     {"depths": None, "eagle_config": {"rope_of_eagles": 1}}),
    (ModelError, "eagle_config=3 must be an object", {"depths": None, "eagle_config": 3}),
    (ModelError, "norm_output=True and eagle_config with norm_output=False contradict",
     {"depths": None, IDS: [1, 2, 3], "norm_output": True, "eagle_config": {"norm_output": False}}),
    # Of a model of four layers: 2, 2 and 1.
    (ModelError, "the default, since the config names none", {"depths": None}),
    (ModelError, "must ascend, from 0 to", {"depths": (1, 3, 2)}),
    (ModelError, "fit a model of 4", {"depths": (1, 3, 5)}),
    (ModelError, f"{IDS}='all' must be a list of layers", {"depths": None, IDS: "all"}),
    (ModelError, "contradict each other: the second ones name layers by their outputs",
     {IDS: [0, 1, 2]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "form"), REFUSED, ids=[each[1] for each in REFUSED])
def test_what_is_no_head_of_this_model_is_refused_by_name(
    target: TinyModel, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build],
    error: type[Exception], words: str, form: dict[str, Any],
) -> None:  # fmt: skip
    form = dict(form)
    unsaid = form.get("form") == "unsaid"
    path = write_head(
        tmp_path / "head", target, **(form | {"form": "specforge"} if unsaid else form)
    )
    if unsaid:
        raw = json.loads((path / "config.json").read_text())
        del raw["fc_norm"]
        (path / "config.json").write_text(json.dumps(raw))
    with torch.inference_mode(), pytest.raises(error, match=words):
        load_head(path, *loaded, platform)


def test_table_of_tokens_that_leads_out_of_the_vocabulary(
    target: TinyModel, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build]
) -> None:
    path = write_head(tmp_path / "head", target)
    tensors = load_file(path / "model.safetensors")
    tensors["d2t"][-1] += 160
    save_file(tensors, path / "model.safetensors")
    with torch.inference_mode(), pytest.raises(LoadError, match="d2t leads to tokens from"):
        load_head(path, *loaded, platform)


def test_both_conventions_may_say_the_same(
    target: TinyModel, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build]
) -> None:
    path = write_head(tmp_path / "head", target, **{IDS: [1, 2, 3]})
    assert json.loads((path / "config.json").read_text())["eagle_config"][IDS] == [0, 1, 2]
    with torch.inference_mode():
        assert load_head(path, *loaded, platform).taps == (1, 2, 3)


def test_an_embedding_that_is_the_models_is_kept_once(
    target: TinyModel, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build]
) -> None:
    path = write_head(tmp_path / "head", target, own_embedding=True)
    with torch.inference_mode():
        head = load_head(path, *loaded, platform)
        assert "embed_tokens.weight" in dict(head.named_parameters())
        tensors = load_file(path / "model.safetensors")
        tensors["embed_tokens.weight"] = target.reference.get_input_embeddings().weight.clone()
        save_file(tensors, path / "model.safetensors")
        head = load_head(path, *loaded, platform)
    assert "embed_tokens.weight" not in dict(head.named_parameters())


def test_weights_may_be_made_up(
    target: TinyModel, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build]
) -> None:
    """From a config alone, as for measurements of speed."""
    path = write_head(tmp_path / "head", target, kind="qwen3")
    (path / "model.safetensors").unlink()
    with torch.inference_mode():
        head = load_head(path, *loaded, platform, load_format="dummy")
    assert "layers.0.self_attn.q_norm.weight" in dict(head.named_parameters())
    assert head.vocab_size == 100
    assert head.token_ids(torch.arange(100, device=platform.device)).tolist() == list(range(100))


def test_default_depths(target: TinyModel) -> None:
    """Of a model of 36 layers, such as Qwen3-8B, and of 32, such as Llama 3.1 8B."""
    raw = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1,
        "vocab_size": 128256, "draft_vocab_size": 32000, "max_position_embeddings": 2048,
        "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "torch_dtype": "float16",
    }  # fmt: skip
    for layers, depths in ((36, (2, 18, 33)), (32, (2, 16, 29))):
        config = read_head(raw, Path("config.json"), Target(layers, 4096, 128256), None)
        assert config.taps == depths
        # Its own base, whatever the model's is.
        assert config.layers.rope_parameters["rope_theta"] == 10000.0


def test_a_head_can_be_loaded_again(
    target: TinyModel, tmp_path: Path, platform: Platform, loaded: tuple[CausalLM, Build]
) -> None:
    """After its memory was changed; what it shares is the model's to mend."""
    path = write_head(tmp_path / "head", target, own_embedding=True)
    tensors = load_file(path / "model.safetensors")
    tensors["embed_tokens.weight"] = target.reference.get_input_embeddings().weight.clone()
    save_file(tensors, path / "model.safetensors")
    with torch.inference_mode():
        head = load_head(path, *loaded, platform)
        own = {**dict(head.named_parameters()), "ids": head.vocabulary.target_ids}
        before = {name: each.clone() for name, each in own.items()}
        for each in own.values():
            each.zero_()
        load_weights(head, path, "auto", platform)
    for name, each in own.items():
        assert torch.equal(each, before[name]), name

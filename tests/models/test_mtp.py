"""Layers that draft further tokens as hybrids store them, against one in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from head_steps import HeadSteps
from helpers import HYBRIDS, VOCAB, TinyModels, random_ids
from next_tokens import Oracle, with_layer
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise import models
from reprise.errors import LoadError, ModelError
from reprise.layers import Build, CausalLM
from reprise.loading import open_checkpoint
from reprise.loading.weights import load_weights
from reprise.models.mtp import NextTokens
from reprise.platforms import Platform

LENGTH, CHAIN = 21, 4


def load(path: Path, platform: Platform) -> tuple[CausalLM, NextTokens]:
    build = Build(torch.float32, platform.device, 256)
    config = open_checkpoint(str(path)).config
    with torch.inference_mode():
        target = models.build(config, build)
        load_weights(target, path, "auto", platform)
        head = models.build_mtp(config, build, target)
        load_weights(head, path, "auto", platform)
    return target, head


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "architecture",
    ["qwen3_next", *(pytest.param(each, marks=pytest.mark.long) for each in HYBRIDS[1:])],
)
def test_layer_is_the_one_in_plain_torch(
    tiny: TinyModels, tmp_path: Path, platform: Platform, architecture: str
) -> None:
    """Over a prompt in two chunks, and along a chain behind it."""
    model, oracle = with_layer(tmp_path / "model", tiny(architecture), architecture)
    _, head = load(model.path, platform)
    assert (head.taps, head.vocab_size) == (("final",), VOCAB)
    text = random_ids(3, LENGTH)
    hidden = oracle.hidden(text[:-1])
    inputs, kept = oracle.inputs(text[1:], hidden), hidden.clone()
    steps, begin = HeadSteps(head, platform, LENGTH), 0
    for end in (7, LENGTH - 1):
        found, logits = steps(begin, text[1 + begin : 1 + end], head.prepare(hidden[begin:end]))
        expected = oracle.outputs(inputs[:end])[begin:]
        close(found, expected)
        close(logits, oracle.logits(expected))
        begin = end
    last = expected[-1:]
    for position in range(LENGTH - 1, LENGTH - 1 + CHAIN):
        (token,) = random_ids(40 + position, 1)
        inputs = torch.cat((inputs, oracle.inputs([token], last)))
        found, logits = steps(position, [token], head.prepare(last))
        last = oracle.outputs(inputs)[-1:]
        close(found, last)
        close(logits, oracle.logits(last))
    assert torch.equal(hidden, kept), "what it reads is the caller's"


def test_experts_as_releases_store_them(
    tiny: TinyModels, tmp_path: Path, platform: Platform
) -> None:
    """One tensor of all experts, or one of each: the same layer."""
    model, _ = with_layer(tmp_path / "model", tiny("qwen3_next"), "qwen3_next")
    _, head = load(model.path, platform)
    file = model.path / "model.safetensors"
    stored = load_file(file)
    path = "mtp.layers.0.mlp.experts."
    gate_up, down = stored.pop(path + "gate_up_proj"), stored.pop(path + "down_proj")
    half = gate_up.shape[1] // 2
    for number in range(len(down)):
        stored[f"{path}{number}.gate_proj.weight"] = gate_up[number, :half].clone()
        stored[f"{path}{number}.up_proj.weight"] = gate_up[number, half:].clone()
        stored[f"{path}{number}.down_proj.weight"] = down[number].clone()
    save_file(stored, file, metadata={"format": "pt"})
    _, other = load(model.path, platform)
    for one, two in zip(head.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_is_not_there_is_refused_by_name(
    tiny: TinyModels, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build(torch.float32, platform.device, 64)
    plain = tiny("qwen3")
    config = open_checkpoint(str(plain.path)).config
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM.* has no layer that drafts"):
        models.build_mtp(config, build, models.build(config, build))
    hybrid = tiny("qwen3_5")
    config = open_checkpoint(str(hybrid.path)).config
    target = models.build(config, build)
    for name, value in (("mtp_num_hidden_layers", 2), ("mtp_use_dedicated_embeddings", True)):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value, raising=False)
            with pytest.raises(ModelError, match=name):
                models.build_mtp(config, build, target)
    with pytest.raises(LoadError, match=r"missing .*mtp\.fc\.weight"):
        load_weights(models.build_mtp(config, build, target), hybrid.path, "auto", platform)


def test_oracle_guesses(tiny: TinyModels, tmp_path: Path) -> None:
    """Its drafts depend on what it reads."""
    _, oracle = with_layer(tmp_path / "model", tiny("qwen3_5"), "qwen3_5")
    assert isinstance(oracle, Oracle)
    assert len({tuple(oracle.drafts(random_ids(seed, 9), 3)) for seed in range(5)}) > 1

"""Layers that draft further tokens as hybrids store them, against one in plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HYBRIDS, VOCAB, TinyModels, random_ids
from next_tokens import Oracle, with_layer
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise import models
from reprise.cache.layout import lay_out_caches
from reprise.cache.memory import allocate_caches
from reprise.errors import LoadError, ModelError
from reprise.layers import Build, CausalLM
from reprise.loading import open_checkpoint
from reprise.loading.weights import load_weights
from reprise.models.mtp import NextTokens
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers

LENGTH, CHAIN, BLOCK = 21, 4, 4


def load(path: Path, platform: Platform) -> tuple[CausalLM, NextTokens]:
    build = Build(torch.float32, platform.device, 256)
    config = open_checkpoint(str(path)).config
    with torch.inference_mode():
        target = models.build(config, build)
        load_weights(target, path, "auto", platform)
        head = models.build_mtp(config, build, target)
        load_weights(head, path, "auto", platform)
    return target, head


class Steps:
    """Runs a layer over one request's tokens, in blocks that do not adjoin."""

    def __init__(self, head: NextTokens, platform: Platform) -> None:
        self.head = head
        caches = head.caches()
        layout = lay_out_caches(caches, BLOCK, 0)
        pools = tuple(dataclasses.replace(each, num_blocks=33) for each in layout.pools)
        layout = dataclasses.replace(layout, pools=pools)
        allocate_caches(caches, layout, platform)
        self.buffers = StepBuffers(LENGTH, 1, 64, layout, platform)
        self.ops = OpTable(platform)
        self.table = np.array([[*range(31, 0, -2)]], dtype=np.int32)
        self.device = platform.device

    def __call__(self, begin: int, ids: Sequence[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of tokens from position ``begin`` on."""
        count = len(ids)
        self.buffers.fill_rows(
            np.array([count]), np.array([begin + count]), [self.table], np.array(ids),
            np.array([count]), np.array([0]),
        )  # fmt: skip
        batch = self.buffers.batch(count, 1, 1 if count == 1 else 0)
        with torch.inference_mode(), self.ops.activate():
            before = hidden.to(self.device)
            kept = before.clone()
            after = self.head(batch, self.head.prepare(before))
            assert torch.equal(before, kept), "what it reads is the caller's"
            logits = torch.empty(count, self.head.vocab_size, device=self.device)
            self.head.logits(after, logits)
        return after.cpu(), logits.cpu()


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
    inputs = oracle.inputs(text[1:], hidden)
    steps, begin = Steps(head, platform), 0
    for end in (7, LENGTH - 1):
        found, logits = steps(begin, text[1 + begin : 1 + end], hidden[begin:end])
        expected = oracle.outputs(inputs[:end])[begin:]
        close(found, expected)
        close(logits, oracle.logits(expected))
        begin = end
    last = expected[-1:]
    for position in range(LENGTH - 1, LENGTH - 1 + CHAIN):
        (token,) = random_ids(40 + position, 1)
        inputs = torch.cat((inputs, oracle.inputs([token], last)))
        found, logits = steps(position, [token], last)
        last = oracle.outputs(inputs)[-1:]
        close(found, last)
        close(logits, oracle.logits(last))


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

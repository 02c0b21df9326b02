"""Checkpoints with a layer that drafts further tokens (``mtp.``), and what it drafts, in torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers import HYBRIDS, TinyModel, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

FC = "mtp.fc.weight"
NORMS = ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")


class Oracle:
    """The layer, from the specification: transformers has the decoder layer, and not the rest.

    Args:
        target: Whose embedding, hidden states and last product it uses.
        layer: A text model of one layer of full attention, whose layer and last norm are its.
        beside: The other tensors.
    """

    def __init__(self, target: Any, layer: Any, beside: dict[str, Tensor]) -> None:
        self._target, self._layer, self._beside = target, layer, beside
        self._text = getattr(target.model, "language_model", target.model)
        self.eps = self._text.config.rms_norm_eps

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + gain)

    def hidden(self, ids: list[int]) -> Tensor:
        """[T, D]: the target's, behind its last norm."""
        return self._text(input_ids=torch.tensor([ids])).last_hidden_state[0]

    def inputs(self, ids: list[int], hidden: Tensor) -> Tensor:
        """What the layer reads in rows that take these tokens and hidden states."""
        embedded = self._text.embed_tokens(torch.tensor(ids))
        first, second = (self._beside[each] for each in NORMS)
        both = torch.cat((self._norm(embedded, first), self._norm(hidden, second)), -1)
        return both @ self._beside[FC].T

    def outputs(self, inputs: Tensor) -> Tensor:
        """Of a text from its beginning on."""
        return self._layer.model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._target.lm_head(hidden)

    @torch.no_grad()
    def drafts(self, text: list[int], count: int) -> list[int]:
        """The likeliest tokens behind a text, the target not having computed its last one."""
        inputs = self.inputs(text[1:], self.hidden(text[:-1]))
        found: list[int] = []
        for _ in range(count):
            out = self.outputs(inputs)[-1:]
            found.append(int(self.logits(out).argmax()))
            inputs = torch.cat((inputs, self.inputs(found[-1:], out)))
        return found


def with_layer(
    path: Path, model: TinyModel, architecture: str, *, guesses: bool = False
) -> tuple[TinyModel, Oracle]:
    """A checkpoint that has the layer beside.

    Args:
        path: Where to write it.
        model: To which it is added.
        architecture: As :func:`helpers.random_model` calls it.
        guesses: It reads the token behind its row, and its layer does little: where the target's do
            as little it is often right. Else it is random.
    """
    shutil.copytree(model.path, path)
    target = model.reference
    config = getattr(target.config, "text_config", target.config)
    fields = {k: getattr(config, k) for k in ("tie_word_embeddings", "num_attention_heads")}
    layer = random_model(
        architecture.removesuffix("_vl"), seed=11, num_hidden_layers=1,
        layer_types=["full_attention"],
        **({"mlp_only_layers": []} if hasattr(config, "mlp_only_layers") else {}), **fields,
    )  # fmt: skip
    size = config.hidden_size
    generator = torch.Generator().manual_seed(12)
    beside = {
        FC: 0.15 * torch.randn(size, 2 * size, generator=generator),
        **{each: torch.rand(size, generator=generator) - 0.5 for each in NORMS},
    }
    if guesses:
        beside[FC] = 0.02 * beside[FC]
        beside[FC][:, :size] += torch.eye(size)
        beside[NORMS[0]] *= 0
        quieten(layer, 0.01)
        text = getattr(target.model, "language_model", target.model)
        layer.model.norm.weight.copy_(text.norm.weight)
    stored = {
        f"mtp.{name.removeprefix('model.')}": each
        for name, each in layer.state_dict().items()
        if name.startswith(("model.layers.0.", "model.norm."))
    }
    file = path / "model.safetensors"
    whole = {k: v.contiguous() for k, v in {**load_file(file), **stored, **beside}.items()}
    save_file(whole, file, metadata={"format": "pt"})
    assert architecture in HYBRIDS
    return TinyModel(path), Oracle(target, layer, beside)


def quieten(model: Any, factor: float) -> None:
    """Have its layers add little to the residual stream."""
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.split(".")[-2] in ("o_proj", "out_proj", "down_proj") or name.endswith(
                "experts.down_proj"
            ):
                each.mul_(factor)

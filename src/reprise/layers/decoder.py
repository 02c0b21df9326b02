"""The pre-norm decoder that the Llama family and its descendants share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch
from reprise.layers.alike import Alike
from reprise.layers.embedding import Embedding
from reprise.layers.lazy import Residual, tensor
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import RMSNorm
from reprise.layers.unseen import Unseen, looks_at_nothing
from reprise.ops.rehearsal import rehearsing

Depth = int | str
"""Where hidden states are taken: a number v means the residual stream behind v layers, which is the
input of layer v, and that of the last norm behind all of them; ``"final"`` what that norm gives.
Of a decoder with several streams ``"stream 0"`` and so on are those behind its last layer."""


class Taps(NamedTuple):
    """Hidden states that a forward pass writes down beside its result."""

    depths: tuple[Depth, ...]
    out: Tensor
    """[T, n * D]: where they go, those of each depth beside those of the one before."""

    def take(self, depth: Depth, states: Tensor) -> None:
        """Write down hidden states [T, D], if they are of a depth that is asked for."""
        width = states.shape[1]
        for number, each in enumerate(self.depths):
            if each == depth:
                self.out[:, number * width : (number + 1) * width].copy_(states)


class Body(Protocol):
    """What of a decoder a language model needs; a module."""

    embed_tokens: Embedding
    layers: nn.ModuleList

    def __call__(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Normalised hidden states [T, D]; others on the way as ``taps`` asks for."""


@looks_at_nothing
class DecoderLayer(nn.Module):
    """Attention, then feed-forward: each reads the normalised residual stream and adds to it.

    Both may be any module that is called with such a :class:`Normed` and the batch, and gives a
    tensor or a :class:`reprise.layers.Product`.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        input_norm: RMSNorm,
        post_attention_norm: RMSNorm,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_norm
        self.post_attention_layernorm = post_attention_norm

    def forward(self, residual: Residual, batch: Batch) -> None:
        """residual: Of [T, D], added to."""
        residual.add(self.self_attn(residual.normed(self.input_layernorm), batch))
        late = isinstance(self.mlp, GatedMLP) and self.mlp.norms
        residual.add(self.mlp(residual.normed(self.post_attention_layernorm, late=late), batch))


class Decoder(nn.Module):
    """Embedding, layers, final norm. Parameter names are those of the checkpoints."""

    def __init__(self, embedding: Embedding, layers: list[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self._layers = layers
        self._unseen = Unseen(layers)
        self._alike = Alike(layers)
        self.norm = norm

    def forward(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Normalised hidden states [T, D]; others on the way as ``taps`` asks for."""
        residual = Residual(self.embed_tokens(batch.token_ids))
        unseen = taps is None and self._unseen.now()
        layers: Sequence[DecoderLayer] = self._layers
        if taps is None and not torch.compiler.is_compiling() and rehearsing():
            layers = [layers[number] for number in self._alike.some()]
        with ops.together() if unseen else contextlib.nullcontext():
            for number, layer in enumerate(layers):
                if taps is not None and number in taps.depths:
                    taps.take(number, residual.values)
                layer(residual, batch)
        hidden = tensor(residual.normed(self.norm))
        if taps is not None:
            taps.take(len(self._layers), residual.values)
            taps.take("final", hidden)
        return hidden

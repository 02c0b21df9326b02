"""The pre-norm decoder that the Llama family and its descendants share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch, LayerCache
from reprise.cache.spec import caches_of
from reprise.layers.attention import SelfAttention
from reprise.layers.build import Build
from reprise.layers.embedding import Embedding
from reprise.layers.linear import Linear
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import RMSNorm


class DecoderLayer(nn.Module):
    """Attention, then feed-forward: each reads the normalised residual stream and adds to it."""

    def __init__(
        self,
        attention: SelfAttention,
        mlp: GatedMLP,
        input_norm: RMSNorm,
        post_attention_norm: RMSNorm,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_norm
        self.post_attention_layernorm = post_attention_norm

    def forward(self, residual: Tensor, batch: Batch) -> None:
        """residual: [T, D], updated in place."""
        self.self_attn(residual, self.input_layernorm, batch)
        self.mlp(residual, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embedding, layers, final norm. Parameter names are those of the checkpoints."""

    def __init__(self, embedding: Embedding, layers: list[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self._layers = layers
        self.norm = norm

    def forward(self, batch: Batch) -> Tensor:
        """Normalised hidden states [T, D]."""
        residual = self.embed_tokens(batch.token_ids)
        for layer in self._layers:
            layer(residual, batch)
        return self.norm(residual)


class CausalLM(nn.Module):
    """A decoder with a language-model head: what every architecture file returns."""

    def __init__(
        self,
        build: Build,
        decoder: Decoder,
        vocab_size: int,
        hidden_size: int,
        *,
        tie_word_embeddings: bool,
    ) -> None:
        super().__init__()
        self._build = build
        self.model = decoder
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.lm_head: Linear | Embedding
        if tie_word_embeddings:
            self.lm_head = decoder.embed_tokens
        else:
            self.lm_head = Linear(build, hidden_size, vocab_size)

    @property
    def tied(self) -> bool:
        return self.lm_head is self.model.embed_tokens

    def untie(self, weight: Tensor) -> None:
        """Give the head a weight of its own, [vocab_size, hidden_size]."""
        nowhere = dataclasses.replace(self._build, device=torch.device("meta"))
        head = Linear(nowhere, self.hidden_size, self.vocab_size)
        head.weight = nn.Parameter(weight, requires_grad=False)
        self.lm_head = head

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden_size] of the step's tokens; writes the KV cache."""
        return self.model(batch)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, hidden_size] to [R, vocab_size], in the compute dtype; in ``out`` if it is given."""
        if out is None:
            return ops.linear(hidden, self.lm_head.weight, None)
        ops.linear_into(hidden, self.lm_head.weight, out)
        return out

    def caches(self) -> dict[str, LayerCache]:
        """What the layers keep from step to step, in the order in which they were made."""
        return caches_of(self)

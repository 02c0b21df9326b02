"""Granite 3 dense models (IBM 2024): Llama whose embedding, sublayers and logits are scaled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reprise.cache import Batch
from reprise.layers import (
    Build,
    CausalLM,
    Decoder,
    DecoderLayer,
    Embedding,
    GatedMLP,
    Residual,
    RMSNorm,
    SelfAttention,
    rotary_table,
    tensor,
)
from reprise.models.config_reader import (
    flag,
    head_size,
    norm_eps,
    require,
    require_sizes,
    rope_parameters,
)

RENAMES = {"language_model.": ""}
"""The speech models of the family store the same decoder under this prefix."""


class ScaledEmbedding(Embedding):
    scale: float

    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(token_ids) * self.scale


class ScaledLayer(DecoderLayer):
    scale: float

    def forward(self, residual: Residual, batch: Batch) -> None:
        attended = self.self_attn(residual.normed(self.input_layernorm), batch)
        residual.add(tensor(attended) * self.scale)
        fed = self.mlp(residual.normed(self.post_attention_layernorm), batch)
        residual.add(tensor(fed) * self.scale)


class Granite(CausalLM):
    scale: float

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return super().logits(hidden / self.scale, out)


def build(config: Any, build: Build) -> Granite:
    """See :func:`reprise.models.registry.build`."""
    require(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    require_sizes(config)
    hidden, heads, size = config.hidden_size, config.num_attention_heads, head_size(config)
    table = rotary_table(
        rope_parameters(config),
        head_size=size,
        max_position_embeddings=config.max_position_embeddings,
        length=build.max_model_len,
        device=build.device,
    )

    def norm() -> RMSNorm:
        return RMSNorm(build, hidden, norm_eps(config))

    def layer(index: int) -> DecoderLayer:
        here = build.at(f"model.layers.{index}")
        attention = SelfAttention(
            here.at("self_attn"),
            hidden,
            heads,
            config.num_key_value_heads,
            size,
            table,
            scale=config.attention_multiplier,
        )
        mlp = GatedMLP(here.at("mlp"), hidden, config.intermediate_size)
        made = ScaledLayer(attention, mlp, norm(), norm())
        made.scale = config.residual_multiplier
        return made

    embedding = ScaledEmbedding(build, config.vocab_size, hidden)
    embedding.scale = config.embedding_multiplier
    decoder = Decoder(embedding, [layer(each) for each in range(config.num_hidden_layers)], norm())
    model = Granite(
        build,
        decoder,
        config.vocab_size,
        hidden,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        renames=RENAMES,
    )
    model.scale = config.logits_scaling
    return model

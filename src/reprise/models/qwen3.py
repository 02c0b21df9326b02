"""Qwen3 dense models (Qwen team 2025): Llama with normalised query and key heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reprise.errors import ModelError
from reprise.layers import (
    CausalLM,
    Decoder,
    DecoderLayer,
    Embedding,
    GatedMLP,
    RMSNorm,
    SelfAttention,
    rotary_table,
)
from reprise.models.config_reader import head_size, require, require_sizes, rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build(
    config: PretrainedConfig, *, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """The model that ``config`` describes, with unset weights, for up to ``max_model_len`` tokens.

    Raises:
        ModelError: The config asks for something that this architecture file does not compute.
    """
    require(config, hidden_act="silu")
    require_sizes(config)
    cos_sin = rotary_table(
        rope_parameters(config),
        head_size=head_size(config),
        max_position_embeddings=config.max_position_embeddings,
        length=max_model_len,
        device=device,
    )

    def norm() -> RMSNorm:
        return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def window(kind: str) -> int:
        if kind == "full_attention":
            return 0
        size = config.sliding_window
        if kind != "sliding_attention":
            raise ModelError(
                f"config field layer_types has {kind!r}, which is not supported; supported: "
                "'full_attention', 'sliding_attention'"
            )
        if not isinstance(size, int) or size < 1:
            raise ModelError(
                f"config field sliding_window={size!r} must be a whole number of at least 1 where "
                "layer_types has 'sliding_attention'"
            )
        return size

    def layer(kind: str) -> DecoderLayer:
        attention = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size(config),
            cos_sin,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm_eps=config.rms_norm_eps,
            sliding_window=window(kind),
            dtype=dtype,
            device=device,
        )
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)
        return DecoderLayer(attention, mlp, norm(), norm())

    embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    decoder = Decoder(embedding, [layer(kind) for kind in config.layer_types], norm())
    return CausalLM(
        decoder,
        config.vocab_size,
        config.hidden_size,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=dtype,
        device=device,
    )

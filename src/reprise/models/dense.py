"""The dense decoder that models since Llama share: an architecture file says what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from reprise.layers import (
    Build,
    CausalLM,
    Decoder,
    DecoderLayer,
    Embedding,
    GatedMLP,
    RMSNorm,
    SelfAttention,
    identity_table,
    rotary_table,
)
from reprise.models.config_reader import (
    Config,
    flag,
    head_size,
    norm_eps,
    require,
    require_attention,
    require_sizes,
    rope_parameters,
)


def build_dense(
    config: Config,
    build: Build,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: Sequence[int] | None = None,
    rotates: Sequence[bool] | None = None,
    mlp: Callable[[Build, int], nn.Module] | None = None,
) -> CausalLM:
    """Grouped-query attention with rotary positions, gated feed-forward, RMS norms before both.

    Args:
        config: Gives sizes, RoPE, epsilon and tying.
        build: How to make the layers.
        qkv_bias: The projections to Q, K and V have a bias.
        output_bias: The attention's output projection has one.
        mlp_bias: The feed-forward's projections have one.
        qk_norm: Query and key heads are normalised.
        windows: Tokens that a token of each layer sees, itself included, 0 for all; None: all.
        rotates: Whether each layer rotates its queries and keys; None: all do.
        mlp: Makes the feed-forward of a layer, from the layer's build and its number; None: SwiGLU
            in all layers.

    Returns:
        The model with unset weights.

    Raises:
        ModelError: The config asks for something that is not computed here.
    """
    require(config, hidden_act="silu")
    require_sizes(config)
    require_attention(config, windows, build.max_model_len)
    layers = config.num_hidden_layers
    eps = norm_eps(config)
    cos_sin = rotary_table(
        rope_parameters(config),
        head_size=head_size(config),
        max_position_embeddings=config.max_position_embeddings,
        length=build.max_model_len,
        device=build.device,
    )
    still = (
        None
        if rotates is None or all(rotates)
        else identity_table(build.max_model_len, build.device)
    )

    def norm() -> RMSNorm:
        return RMSNorm(build, config.hidden_size, eps)

    def gated(here: Build, index: int) -> nn.Module:
        sizes = config.hidden_size, config.intermediate_size
        return GatedMLP(here.at("mlp"), *sizes, bias=mlp_bias)

    feed_forward = mlp or gated

    def layer(index: int) -> DecoderLayer:
        here = build.at(f"model.layers.{index}")
        attention = SelfAttention(
            here.at("self_attn"),
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size(config),
            cos_sin if still is None or rotates is None or rotates[index] else still,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm_eps=eps if qk_norm else None,
            sliding_window=0 if windows is None else windows[index],
        )
        return DecoderLayer(attention, feed_forward(here, index), norm(), norm())

    embedding = Embedding(build, config.vocab_size, config.hidden_size)
    decoder = Decoder(embedding, [layer(index) for index in range(layers)], norm())
    return CausalLM(
        build,
        decoder,
        config.vocab_size,
        config.hidden_size,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
    )

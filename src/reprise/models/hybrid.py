"""The decoder that Qwen3-Next and its successors share: linear attention in most layers, full
attention with a gate in some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from reprise.errors import ModelError
from reprise.layers import (
    Build,
    CausalLM,
    CentredRMSNorm,
    Decoder,
    DecoderLayer,
    Embedding,
    GatedDeltaNet,
    GatedMLP,
    SelfAttention,
    rotary_table,
)
from reprise.models.config_reader import (
    Config,
    flag,
    head_size,
    layer_kinds,
    norm_eps,
    require,
    require_sizes,
    require_whole_contexts,
    rope_parameters,
    whole_number,
)

ROTATED = 1 / 4
"""Of the channels of a head, where a config does not say: these families never rotated all."""
FULL, _LINEAR = "full_attention", "linear_attention"
MLP = Callable[[Build, int], nn.Module]
"""Makes the feed-forward of a layer, of the layer's build and number."""
_TEXT = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.",
}
"""Where the text part of a multimodal checkpoint lies."""
_OTHERS = ("mtp.", "model.visual.", "visual.")
"""What checkpoints have beside: a layer that drafts, and what reads images."""


def build_hybrid(
    config: Config,
    build: Build,
    *,
    interleaved: bool = False,
    mlp: MLP | None = None,
) -> CausalLM:
    """Gated delta nets and gated attention by ``layer_types``, norms with gains around 1.

    Args:
        config: Gives sizes, kinds of layers, RoPE, epsilon and tying.
        build: How to make the layers.
        interleaved: See :class:`reprise.layers.GatedDeltaNet`.
        mlp: Makes the feed-forward of a layer, from the layer's build and its number; None: SwiGLU
            in all layers.

    Returns:
        The model with unset weights.

    Raises:
        ModelError: The config asks for something that is not computed here.
    """
    layer = layer_maker(config, build, interleaved=interleaved, mlp=mlp)
    kinds = layer_kinds(config, (FULL, _LINEAR))
    require_whole_contexts(config, build.max_model_len, has_windows=False)
    embedding = Embedding(build, config.vocab_size, config.hidden_size)
    layers = [layer(build.at(f"model.layers.{n}"), n, kind) for n, kind in enumerate(kinds)]
    norm = CentredRMSNorm(build.at("model.norm"), config.hidden_size, norm_eps(config))
    return CausalLM(
        build,
        Decoder(embedding, layers, norm),
        config.vocab_size,
        config.hidden_size,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        renames=_TEXT,
        others=_OTHERS,
    )


def layer_maker(
    config: Config,
    build: Build,
    *,
    interleaved: bool = False,
    mlp: MLP | None,
    cos_sin: Tensor | None = None,
) -> Callable[[Build, int, str], DecoderLayer]:
    """Makes a layer of its build, its number and its kind; arguments and errors as of
    :func:`build_hybrid`, but for ``cos_sin``: the rotary table, if there is one."""
    require(config, hidden_act="silu", attention_bias=False, attn_output_gate=True)
    if getattr(config, "output_gate_type", None) != "swish":  # another name of SiLU
        require(config, output_gate_type="silu")
    require(config, mamba_ssm_dtype="float32")
    require_sizes(config, dense=mlp is None)
    hidden, eps = config.hidden_size, norm_eps(config)
    size = head_size(config)
    if cos_sin is None:
        cos_sin = rotary_table(
            _rope(config, size),
            head_size=size,
            max_position_embeddings=config.max_position_embeddings,
            length=build.max_model_len,
            device=build.device,
        )
    linear = _linear_sizes(config)

    def mixer(here: Build, kind: str) -> nn.Module:
        if kind == _LINEAR:
            return GatedDeltaNet(
                here.at("linear_attn"), hidden, **linear, eps=eps, interleaved=interleaved
            )
        return SelfAttention(
            here.at("self_attn"),
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            size,
            cos_sin,
            qk_norm_eps=eps,
            norm=CentredRMSNorm,
            output_gate=True,
        )

    def layer(here: Build, index: int, kind: str) -> DecoderLayer:
        feed_forward = (
            GatedMLP(here.at("mlp"), hidden, config.intermediate_size)
            if mlp is None
            else mlp(here, index)
        )
        first = CentredRMSNorm(here.at("input_layernorm"), hidden, eps)
        second = CentredRMSNorm(here.at("post_attention_layernorm"), hidden, eps)
        return DecoderLayer(mixer(here, kind), feed_forward, first, second)

    return layer


def _linear_sizes(config: Config) -> dict[str, int]:
    sizes = {
        "key_heads": whole_number(config, "linear_num_key_heads"),
        "value_heads": whole_number(config, "linear_num_value_heads"),
        "key_size": whole_number(config, "linear_key_head_dim"),
        "value_size": whole_number(config, "linear_value_head_dim"),
        "taps": whole_number(config, "linear_conv_kernel_dim"),
    }
    if sizes["value_heads"] % sizes["key_heads"]:
        raise ModelError(
            f"config field linear_num_value_heads={sizes['value_heads']} must be a multiple of "
            f"linear_num_key_heads={sizes['key_heads']}"
        )
    if sizes["taps"] < 2:
        raise ModelError(f"config field linear_conv_kernel_dim={sizes['taps']} must be at least 2")
    return sizes


def _rope(config: Config, size: int) -> Mapping[str, Any]:
    """Positions of text alone: where they have three parts, for images, all are the same, and the
    rotation is the one of a single position."""
    parameters = dict(rope_parameters(config, partial=True))
    sections = parameters.pop("mrope_section", None)
    parameters.pop("mrope_interleaved", None)
    if parameters.get("partial_rotary_factor") is None:
        parameters["partial_rotary_factor"] = ROTATED
    if sections is not None:
        rotated = int(size * parameters["partial_rotary_factor"]) // 2
        whole = isinstance(sections, list) and all(type(each) is int for each in sections)
        if not whole or sum(sections) != rotated:
            raise ModelError(
                f"rope_parameters mrope_section={sections!r} must be numbers of frequencies that "
                f"are {rotated} together"
            )
    return parameters

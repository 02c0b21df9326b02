"""SmolLM3 (Hugging Face 2025): Llama whose every fourth layer knows no positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reprise.errors import ModelError
from reprise.layers import CausalLM
from reprise.models.config_reader import flag, layer_count, sliding_windows
from reprise.models.dense import build_dense

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build(
    config: PretrainedConfig, *, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """The model that ``config`` describes, with unset weights, for up to ``max_model_len`` tokens.

    Raises:
        ModelError: The config asks for something that this architecture file does not compute.
    """
    attention_bias = flag(config, "attention_bias")
    return build_dense(
        config,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
        windows=sliding_windows(config),
        rotates=_rotates(config),
    )


def _rotates(config: PretrainedConfig) -> list[bool]:
    """``no_rope_layers`` says 1 for a layer that rotates, in spite of its name.

    transformers fills it in from ``no_rope_layer_interval``.
    """
    values = config.no_rope_layers
    layers = layer_count(config)
    if not isinstance(values, list | tuple) or len(values) != layers:
        raise ModelError(
            f"config field no_rope_layers={values!r} must be a list of num_hidden_layers={layers} "
            "numbers"
        )
    if any(value not in (0, 1) for value in values):
        raise ModelError(
            f"config field no_rope_layers={values!r} must say 1 (rotates) or 0 (does not) for each "
            "layer"
        )
    return [bool(value) for value in values]

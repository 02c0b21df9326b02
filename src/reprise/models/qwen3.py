"""Qwen3 dense models (Qwen team 2025): Llama with normalised query and key heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reprise.layers import CausalLM
from reprise.models.config_reader import flag, sliding_windows
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
        qk_norm=True,
        windows=sliding_windows(config),
    )

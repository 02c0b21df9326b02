"""Mistral 7B and its dense successors (Jiang et al. 2023): Llama with a window in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reprise.layers import CausalLM
from reprise.models.config_reader import layer_count, require, window_size
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
    # Readers of such a config disagree about whether it means anything.
    require(config, layer_types=None)
    size = 0 if config.sliding_window is None else window_size(config)
    return build_dense(
        config,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        windows=[size] * layer_count(config),
    )

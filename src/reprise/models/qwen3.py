"""Qwen3 dense models (Qwen team 2025): Llama with normalised query and key heads."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, flag, sliding_windows
from reprise.models.dense import build_dense


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    bias = flag(config, "attention_bias")
    return build_dense(
        config,
        build,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=sliding_windows(config),
    )

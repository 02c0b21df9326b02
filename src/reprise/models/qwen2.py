"""Qwen2 and Qwen2.5 dense models (Qwen team 2024): Llama with biased Q, K and V projections."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, sliding_windows
from reprise.models.dense import build_dense


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    return build_dense(
        config,
        build,
        qkv_bias=True,
        windows=sliding_windows(config),
    )

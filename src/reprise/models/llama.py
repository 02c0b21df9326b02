"""Llama 2, 3, 3.1, 3.2, 3.3 (Touvron et al. 2023; Llama team 2024)."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, flag
from reprise.models.dense import build_dense


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    bias = flag(config, "attention_bias")
    return build_dense(
        config,
        build,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=flag(config, "mlp_bias"),
    )

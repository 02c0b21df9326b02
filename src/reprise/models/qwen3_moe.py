"""Qwen3 mixtures of experts, 30B-A3B and 235B-A22B (Qwen team 2025): Qwen3 with experts."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, flag, same_windows
from reprise.models.dense import build_dense
from reprise.models.sparse import sparse_mlps


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    bias = flag(config, "attention_bias")
    return build_dense(
        config,
        build,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=same_windows(config),  # none as well where use_sliding_window says no
        mlp=sparse_mlps(config, renormalize=flag(config, "norm_topk_prob")),
    )

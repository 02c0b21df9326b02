"""Qwen1.5-MoE and Qwen2-57B-A14B (Qwen team 2024): Qwen2 with experts, one of them for all rows."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, flag, sliding_windows
from reprise.models.dense import build_dense
from reprise.models.sparse import sparse_mlps


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    return build_dense(
        config,
        build,
        qkv_bias=flag(config, "qkv_bias"),
        windows=sliding_windows(config),
        mlp=sparse_mlps(config, renormalize=flag(config, "norm_topk_prob"), shared=True),
    )

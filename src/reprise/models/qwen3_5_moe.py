"""Qwen3.5 and 3.6 mixtures of experts (Qwen team 2026), and the text part of those that see."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config
from reprise.models.hybrid import build_hybrid
from reprise.models.sparse import sparse_mlps


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    mlp = sparse_mlps(config, renormalize=True, shared=True)
    return build_hybrid(config, build, mlp=mlp)

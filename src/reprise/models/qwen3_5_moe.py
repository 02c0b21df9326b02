"""Qwen3.5 and 3.6 mixtures of experts (Qwen team 2026), and the text part of those that see."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config
from reprise.models.hybrid import MLP, build_hybrid
from reprise.models.mtp import NextTokens
from reprise.models.sparse import sparse_mlps


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    return build_hybrid(config, build, mlp=_mlps(config))


def build_mtp(config: Config, build: Build, target: CausalLM) -> NextTokens:
    """See :func:`reprise.models.registry.build_mtp`."""
    return NextTokens(config, build, target, _mlps(config))


def _mlps(config: Config) -> MLP:
    return sparse_mlps(config, renormalize=True, shared=True, everywhere=True)

"""Qwen3.5, 3.6 and 3.8 dense models (Qwen team 2026), and the text part of those that see."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config
from reprise.models.hybrid import build_hybrid
from reprise.models.mtp import NextTokens


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    return build_hybrid(config, build)


def build_mtp(config: Config, build: Build, target: CausalLM) -> NextTokens:
    """See :func:`reprise.models.registry.build_mtp`."""
    return NextTokens(config, build, target)

"""Mistral 7B and its dense successors (Jiang et al. 2023): Llama with a window in every layer."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, require, same_windows
from reprise.models.dense import build_dense


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    # Readers of such a config disagree about whether it means anything.
    require(config, layer_types=None)
    return build_dense(config, build, windows=same_windows(config))

"""Mistral 7B and its dense successors (Jiang et al. 2023): Llama with a window in every layer."""

from __future__ import annotations

from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, layer_count, require, window_size
from reprise.models.dense import build_dense


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    # Readers of such a config disagree about whether it means anything.
    require(config, layer_types=None)
    size = 0 if config.sliding_window is None else window_size(config)
    return build_dense(
        config,
        build,
        windows=[size] * layer_count(config),
    )

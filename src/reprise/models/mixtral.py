"""Mixtral 8x7B and 8x22B (Jiang et al. 2024): Mistral with experts in every layer."""

from __future__ import annotations

from torch import nn

from reprise.layers import Build, CausalLM, SparseMLP
from reprise.models.config_reader import Config, same_windows
from reprise.models.dense import build_dense
from reprise.models.sparse import routing_of


def build(config: Config, build: Build) -> CausalLM:
    """See :func:`reprise.models.registry.build`."""
    windows = same_windows(config)
    routing = routing_of(config, renormalize=True)

    def mlp(build: Build, index: int) -> nn.Module:
        sizes = config.hidden_size, config.intermediate_size
        here = build.at("block_sparse_moe")
        return SparseMLP(here, *sizes, routing, names=("w1", "w3", "w2"))

    return build_dense(config, build, windows=windows, mlp=mlp)

"""Which layers have experts, and how rows are sent to them, as the configs of Qwen say it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from reprise.errors import ModelError
from reprise.layers import Build, GatedMLP, Routing, SparseMLP
from reprise.models.config_reader import Config, layer_count, whole_number


def sparse_mlps(
    config: Config, *, renormalize: bool, shared: bool = False, everywhere: bool = False
) -> Callable[[Build, int], nn.Module]:
    """Makes the feed-forward of each layer: one of experts, or a dense one.

    Layer i has experts if ``i + 1`` is a multiple of ``decoder_sparse_step`` and i is not among
    ``mlp_only_layers``.

    Args:
        config: Of a checkpoint.
        renormalize: The weights of a row's experts are divided by their sum.
        shared: One more expert of ``shared_expert_intermediate_size`` computes all rows.
        everywhere: The family has neither field, whatever a file says: all layers have experts.

    Returns:
        A function of a layer's build and number.

    Raises:
        ModelError: A field is none of what it can be.
    """
    sparse = [True] * layer_count(config) if everywhere else _sparse_layers(config)
    routing = routing_of(config, renormalize=renormalize) if any(sparse) else None
    hidden, inner = config.hidden_size, 0
    shared_size = 0
    if routing is not None:
        inner = whole_number(config, "moe_intermediate_size")
        shared_size = whole_number(config, "shared_expert_intermediate_size") if shared else 0

    def make(build: Build, index: int) -> nn.Module:
        here = build.at("mlp")
        if routing is None or not sparse[index]:
            return GatedMLP(here, hidden, whole_number(config, "intermediate_size"))
        return SparseMLP(here, hidden, inner, routing, shared_size=shared_size)

    return make


def routing_of(config: Config, *, renormalize: bool) -> Routing:
    """Softmax over ``num_experts``, of which ``num_experts_per_tok`` are chosen.

    Raises:
        ModelError: There are not so many.
    """
    experts, top = whole_number(config, "num_experts"), whole_number(config, "num_experts_per_tok")
    if top > experts:
        raise ModelError(
            f"config field num_experts_per_tok={top} must be at most num_experts={experts}"
        )
    return Routing(experts, top, renormalize)


def _sparse_layers(config: Config) -> list[bool]:
    layers = layer_count(config)
    if config.num_experts == 0:
        return [False] * layers
    whole_number(config, "num_experts")
    step = 1
    if getattr(config, "decoder_sparse_step", None) is not None:
        step = whole_number(config, "decoder_sparse_step")
    dense = getattr(config, "mlp_only_layers", None) or []
    if not isinstance(dense, list | tuple) or any(type(each) is not int for each in dense):
        raise ModelError(f"config field mlp_only_layers={dense!r} must be a list of layer numbers")
    return [(index + 1) % step == 0 and index not in dense for index in range(layers)]

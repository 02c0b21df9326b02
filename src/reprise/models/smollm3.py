"""SmolLM3 (Hugging Face 2025): Llama whose every fourth layer knows no positions."""

from __future__ import annotations

from reprise.errors import ModelError
from reprise.layers import Build, CausalLM
from reprise.models.config_reader import Config, flag, layer_count, sliding_windows
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
        windows=sliding_windows(config),
        rotates=_rotates(config),
    )


def _rotates(config: Config) -> list[bool]:
    """``no_rope_layers`` says 1 for a layer that rotates, in spite of its name.

    transformers fills it in from ``no_rope_layer_interval``.
    """
    values = config.no_rope_layers
    layers = layer_count(config)
    if not isinstance(values, list | tuple) or len(values) != layers:
        raise ModelError(
            f"config field no_rope_layers={values!r} must be a list of num_hidden_layers={layers} "
            "numbers"
        )
    if any(value not in (0, 1) for value in values):
        raise ModelError(
            f"config field no_rope_layers={values!r} must say 1 (rotates) or 0 (does not) for each "
            "layer"
        )
    return [bool(value) for value in values]

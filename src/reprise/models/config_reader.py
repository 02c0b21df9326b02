"""Read what all architectures need from a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reprise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def head_size(config: PretrainedConfig) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def require_sizes(config: PretrainedConfig) -> None:
    """Refuse a config from whose sizes no decoder can be built.

    Raises:
        ModelError: Names the field, its value and what it must be.
    """
    for name in _SIZES:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"config field {name}={value!r} must be a whole number of at least 1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ModelError(
            f"config field num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    if head_size(config) % 2:
        raise ModelError(f"config field head_dim={head_size(config)} must be even")


def rope_parameters(config: PretrainedConfig) -> Mapping[str, Any]:
    """Of an architecture that rotates all channels of a head.

    Raises:
        ModelError: The config asks for fewer.
    """
    parameters: Mapping[str, Any] = config.rope_parameters
    share = parameters.get("partial_rotary_factor")
    if share not in (None, 1):
        raise ModelError(
            f"rope_parameters partial_rotary_factor={share!r} is not supported for "
            f"{config.model_type!r}; supported: 1"
        )
    return parameters


def require(config: PretrainedConfig, **expected: Any) -> None:
    """Refuse a config whose fields differ from what the architecture file computes.

    Raises:
        ModelError: Names the field, its value and the only supported one.
    """
    for name, value in expected.items():
        found = getattr(config, name, value)
        if found != value:
            raise ModelError(
                f"config field {name}={found!r} is not supported for "
                f"{config.model_type!r}; supported: {value!r}"
            )

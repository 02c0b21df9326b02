"""Read what all architectures need from a Hugging Face config."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from reprise.errors import ModelError


def head_size(config: PretrainedConfig) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


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

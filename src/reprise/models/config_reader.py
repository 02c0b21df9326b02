"""Read what all architectures need from a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from reprise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config: TypeAlias = "PretrainedConfig"
"""As transformers reads it from a checkpoint's ``config.json``."""

LARGEST_SIZE = 2**31 - 1
"""Kernels count in 32 bits."""
LARGEST_HEAD = 65536
"""Channels. The rotary table is computed on the host before anything can be too large for it."""
MOST_LAYERS = 10_000
"""More than any model has. A config that asks for more is wrong, and would build for ever."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def whole_number(config: Config, name: str) -> int:
    """A field that must be a whole number of at least 1.

    Raises:
        ModelError: It is something else.
    """
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config field {name}={value!r} must be a whole number of at least 1")
    if value > LARGEST_SIZE:
        raise ModelError(f"config field {name}={value} must be at most {LARGEST_SIZE}")
    return value


def require_layer_count(layers: int) -> None:
    """Refuse a number of layers that cannot be meant.

    Raises:
        ModelError: There are more than :data:`MOST_LAYERS`.
    """
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(f"config field num_hidden_layers={layers} must be at most {MOST_LAYERS}")


def layer_count(config: Config) -> int:
    """``num_hidden_layers``.

    Raises:
        ModelError: It is no number of layers.
    """
    layers = whole_number(config, "num_hidden_layers")
    require_layer_count(layers)
    return layers


def head_size(config: Config) -> int:
    """Channels of a head: ``head_dim``, or an equal share of ``hidden_size``.

    Raises:
        ModelError: It is no even number.
    """
    if getattr(config, "head_dim", None) is not None:
        size = whole_number(config, "head_dim")
    else:
        hidden, heads = config.hidden_size, config.num_attention_heads
        size = hidden // heads
        if size * heads != hidden:
            raise ModelError(
                f"config field hidden_size={hidden} must be a multiple of "
                f"num_attention_heads={heads} where head_dim is not given"
            )
    if size % 2 or size > LARGEST_HEAD:
        raise ModelError(f"config field head_dim={size} must be even and at most {LARGEST_HEAD}")
    return size


def require_sizes(config: Config, *, dense: bool = True) -> None:
    """Refuse a config from whose sizes no decoder can be built, or that is of an encoder.

    Args:
        config: Of a checkpoint.
        dense: Every layer has a feed-forward of ``intermediate_size``.

    Raises:
        ModelError: Names the field, its value and what it must be.
    """
    layer_count(config)
    if getattr(config, "is_causal", None) not in (True, None):
        raise ModelError(
            f"config field is_causal={config.is_causal!r} is not supported; supported: true. "
            "Models whose tokens attend to later ones make embeddings; this engine generates text"
        )
    for name in _SIZES:
        if dense or name != "intermediate_size":
            whole_number(config, name)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ModelError(
            f"config field num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    head_size(config)


def flag(config: Config, name: str) -> bool:
    """A field that says yes or no.

    Raises:
        ModelError: It says neither.
    """
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise ModelError(f"config field {name}={value!r} must be true or false")
    return value


def norm_eps(config: Config) -> float:
    """``rms_norm_eps``.

    Raises:
        ModelError: It is no number that a mean square can be raised by.
    """
    value = config.rms_norm_eps
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ModelError(
            f"config field rms_norm_eps={value!r} must be a number of at least 0 and below 1"
        )
    return float(value)


def window_size(config: Config) -> int:
    """``sliding_window`` of an architecture, or of the layers, that have one.

    Raises:
        ModelError: It is no number of tokens.
    """
    return whole_number(config, "sliding_window")


def same_windows(config: Config) -> list[int]:
    """The window of each layer, 0 for none, of an architecture in which all have the same.

    Raises:
        ModelError: ``sliding_window`` is no number of tokens, or there is no number of layers.
    """
    size = 0 if config.sliding_window is None else window_size(config)
    return [size] * layer_count(config)


def layer_kinds(config: Config, supported: Sequence[str]) -> Sequence[str]:
    """``layer_types``.

    Args:
        config: Of a checkpoint.
        supported: Those that the architecture computes.

    Raises:
        ModelError: A layer is of another type, or the list is not one of all layers.
    """
    kinds, layers = config.layer_types, layer_count(config)
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ModelError(
            f"config field layer_types={kinds!r} must be a list of num_hidden_layers={layers} names"
        )
    for kind in kinds:
        if kind not in supported:
            raise ModelError(
                f"config field layer_types has {kind!r}, which is not supported; supported: "
                f"{', '.join(map(repr, supported))}"
            )
    return kinds


def sliding_windows(config: Config) -> list[int]:
    """The window of each layer, 0 for none, by ``layer_types``.

    Raises:
        ModelError: A layer is of another type, or the list is not one of all layers.
    """
    kinds = layer_kinds(config, ("full_attention", "sliding_attention"))
    return [window_size(config) if kind == "sliding_attention" else 0 for kind in kinds]


def require_attention(config: Config, windows: Sequence[int] | None, length: int) -> None:
    """Refuse a config that asks for other attention than its architecture computes: transformers
    looks at none of these fields in a forward pass, vLLM at all of them.

    Args:
        config: Of a checkpoint.
        windows: Of the layers, 0 for none; None: none has any.
        length: Of the longest context.

    Raises:
        ModelError: ``layer_types`` contradicts the windows, or as of
            :func:`require_whole_contexts`.
    """
    kinds = getattr(config, "layer_types", None)
    computed = [
        "sliding_attention" if each else "full_attention"
        for each in windows or [0] * layer_count(config)
    ]
    if kinds is not None and (not isinstance(kinds, list | tuple) or list(kinds) != computed):
        raise ModelError(
            f"config field layer_types={kinds!r} is not followed for {config.model_type!r}, whose "
            f"layers are {computed!r} by the other fields; correct config.json, or give "
            "hf_overrides={'layer_types': None}"
        )
    require_whole_contexts(config, length, has_windows=windows is not None)


def require_whole_contexts(config: Config, length: int, *, has_windows: bool) -> None:
    """Refuse a config by which other readers cut off what a token sees, and layers here do not.

    Args:
        config: Of a checkpoint.
        length: Of the longest context.
        has_windows: The family has them, by ``sliding_window`` as it reads it.

    Raises:
        ModelError: The context is so long that ``dual_chunk_attention_config``, or a window or
            chunk that the family does not know, would change it. transformers' cache drops the
            tokens that have left these two, in generations alone.
    """
    for name in ("attention_chunk_size", *(() if has_windows else ("sliding_window",))):
        size = getattr(config, name, None)
        off = name == "sliding_window" and getattr(config, "use_sliding_window", None) is False
        if size is not None and not off and (not isinstance(size, int) or 0 < size < length):
            raise ModelError(
                f"config field {name}={size!r} is not followed for {config.model_type!r}, whose "
                f"tokens see all before them, and changes contexts such as of {length} tokens; "
                f"give a smaller max_model_len, or hf_overrides={{{name!r}: None}}"
            )
    chunks = getattr(config, "dual_chunk_attention_config", None)
    if chunks is None:
        return
    given = chunks if isinstance(chunks, Mapping) else {}
    size, local = given.get("chunk_size"), given.get("local_size")
    if not isinstance(size, int) or not isinstance(local, int) or length > size - local:
        raise ModelError(
            f"config field dual_chunk_attention_config={chunks!r} is not followed, and changes "
            f"contexts beyond its chunk_size less local_size, such as of {length} tokens; give a "
            "smaller max_model_len, or hf_overrides={'dual_chunk_attention_config': None} for "
            "plain attention"
        )


def rope_parameters(config: Config, *, partial: bool = False) -> Mapping[str, Any]:
    """The parameters of an architecture that rotates the heads of all layers alike.

    Args:
        config: Of a checkpoint.
        partial: Only some channels of a head may rotate.

    Raises:
        ModelError: The config asks for something else.
    """
    parameters = config.rope_parameters
    if not isinstance(parameters, Mapping):
        raise ModelError(f"config field rope_parameters={parameters!r} must be an object")
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelError(
            f"config field rope_parameters has others for {', '.join(nested)}, which is not "
            f"supported for {config.model_type!r}; supported: one RoPE for all layers"
        )
    share = parameters.get("partial_rotary_factor")
    if not partial and share not in (None, 1):
        raise ModelError(
            f"rope_parameters partial_rotary_factor={share!r} is not supported for "
            f"{config.model_type!r}; supported: 1"
        )
    return parameters


def require(config: Config, **expected: Any) -> None:
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

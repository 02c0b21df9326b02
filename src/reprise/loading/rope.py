"""One RoPE out of two places and two spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise.errors import ConfigError, ModelError
from reprise.layers import parameters_of

_OF_EVERY_TYPE = ("rope_theta", "partial_rotary_factor")
_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""How positions of images are rotated, whatever the type; where the file says it, overrides may."""
_ORIGINAL = "original_max_position_embeddings"


def resolve_rope(
    raw: Mapping[str, Any], given: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Say everything about RoPE in ``rope_parameters``, as transformers 5 does.

    transformers 4 has ``rope_scaling`` (its type under ``type`` or ``rope_type``) beside
    ``rope_theta``. What a file or the overrides leave out stays as it was; another
    ``rope_type`` drops the parameters of the one before, and None for the whole drops the scaling.

    Args:
        raw: The config with its overrides; RoPE fields apart, it is returned as it is.
        given: The config's file.
        overrides: Laid over it.

    Raises:
        ConfigError: The overrides have a parameter that the type does not take.
        ModelError: A source contradicts itself, or holds something else than objects.
    """
    file, upper = _said(given, "config.json"), _said(overrides, "hf_overrides")
    result = {name: value for name, value in raw.items() if name != "rope_scaling"}
    if any(isinstance(value, Mapping) for value in [*file.values(), *upper.values()]):
        # One for each type of layer. The architecture file says whether it computes that.
        result["rope_parameters"] = _by_layer(file, upper)
        return result
    rope = _over(file, upper)
    _refuse_unknown(rope, upper, file)
    if _ORIGINAL in (_parameters(rope) or ()):
        # Beside the parameters it says something about the model, whatever the type was.
        for source, said in ((given, file), (overrides, upper)):
            if source.get(_ORIGINAL) is not None:
                _set(said, _ORIGINAL, source[_ORIGINAL])
                if source is overrides or _ORIGINAL not in upper:
                    rope[_ORIGINAL] = source[_ORIGINAL]
    if rope:
        result["rope_parameters"] = rope
    for name in (*_OF_EVERY_TYPE, _ORIGINAL):
        if name in result and name in rope:
            result[name] = rope[name]
    return result


def _said(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All parameters that one source gives, in the new spelling."""
    result: dict[str, Any] = {}
    for spelling in ("rope_parameters", "rope_scaling"):
        value = source.get(spelling)
        if value is None:
            if spelling in source and name == "hf_overrides":
                result = _over(result, {"rope_type": "default"})
            continue
        if not isinstance(value, Mapping):
            raise ModelError(f"{name}: {spelling}={value!r} must be an object or null")
        value = dict(value)
        kind = value.pop("type", None)
        if kind is not None:
            value.setdefault("rope_type", kind)
        result = _over(result, value)
    for field in _OF_EVERY_TYPE:
        if source.get(field) is not None:
            _set(result, field, source[field])
    return result


def _set(rope: dict[str, Any], field: str, value: Any) -> None:
    """What stands beside the parameters and in them must be the same."""
    if rope.setdefault(field, value) != value:
        raise ModelError(
            f"{field}={value!r} and rope_parameters with {field}={rope[field]!r} contradict each "
            "other; remove one"
        )


def _parameters(rope: Mapping[str, Any]) -> frozenset[str] | None:
    """Names that parameters of this type may have; None if the type is not known."""
    kind = rope.get("rope_type", "default")
    return parameters_of(kind) if isinstance(kind, str) else None


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    kind = upper.get("rope_type")
    if kind is not None and kind != lower.get("rope_type", "default"):
        lower = {name: value for name, value in lower.items() if name in _OF_EVERY_TYPE}
    return {**lower, **upper}


def _by_layer(file: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(file)
    for name, value in upper.items():
        below = result.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _over(below, value)
        result[name] = value
    return result


def _refuse_unknown(
    rope: Mapping[str, Any], upper: Mapping[str, Any], file: Mapping[str, Any]
) -> None:
    takes = _parameters(rope)
    if takes is None:
        return  # an unknown type, which the architecture file refuses
    for name in upper:
        if name not in takes and not (name in _OF_IMAGES and name in file):
            raise ConfigError(
                f"hf_overrides: rope_parameters has {name!r}, which rope_type="
                f"{rope.get('rope_type', 'default')!r} does not take; it takes: "
                f"{', '.join(sorted(takes))}"
            )

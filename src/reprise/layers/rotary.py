"""Rotary position embedding and the rescalings of it that checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.errors import ModelError

_ALWAYS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})
_OF_TYPE: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "longrope": frozenset(
        {
            "short_factor",
            "long_factor",
            "factor",
            "attention_factor",
            "original_max_position_embeddings",
        }
    ),
}
_MOST = 1e15
"""Far above what any parameter can mean, and far below what powers of it overflow at."""
_CHUNK = 65536
"""Positions that are computed at once; bounds the memory beside the table."""


def parameters_of(rope_type: str) -> frozenset[str] | None:
    """Names that ``rope_parameters`` of this type may have; None if the type is not known."""
    names = _OF_TYPE.get(rope_type)
    return None if names is None else _ALWAYS | names


def context_length(parameters: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Positions that the embedding is made for.

    YaRN stretches ``original_max_position_embeddings`` by ``factor``, linear and dynamic scaling
    stretch the config's ``max_position_embeddings``. That of a llama3 or longrope config is the
    stretched length already. So vLLM reads them, too.

    Raises:
        ModelError: A parameter is no number above 0.
    """
    kind = parameters.get("rope_type", "default")
    if kind == "yarn":
        original, factor = _stretch(parameters, max_position_embeddings)
    elif kind in ("linear", "dynamic"):
        original, factor = max_position_embeddings, _number(parameters, "factor")
    else:
        original, factor = max_position_embeddings, 1.0
    return max(1, int(original * factor))


def default_length(parameters: Mapping[str, Any], max_position_embeddings: int) -> int:
    """The context to offer where none is asked for.

    Of longrope it is the original one: beyond it all requests, short ones too, are computed with
    the long factors, and less well.

    Raises:
        ModelError: A parameter is no number above 0.
    """
    longest = context_length(parameters, max_position_embeddings)
    if parameters.get("rope_type") == "longrope":
        return min(longest, max(1, int(_stretch(parameters, max_position_embeddings)[0])))
    return longest


def describe_rotary(
    parameters: Mapping[str, Any], max_position_embeddings: int, length: int
) -> str:
    """The resolved parameters and what they mean for a context of ``length``, in one line."""
    parts = [
        f"{name}={value}"
        for name, value in parameters.items()
        if value is not None and not isinstance(value, list)
    ]
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":
        longest = context_length(parameters, max_position_embeddings)
        parts.append(f"scaled as for {longest} tokens at every length")
    elif kind == "longrope":
        original = int(_stretch(parameters, max_position_embeddings)[0])
        which = "long" if length > original else "short"
        parts.append(f"{which}_factor, since max_model_len={length} and the original is {original}")
    return ", ".join(parts)


def identity_table(length: int, device: torch.device) -> Tensor:
    """A table that rotates nothing, for layers without positions: [length, 2]."""
    return torch.tensor([[1.0, 0.0]], dtype=torch.float32).repeat(length, 1).to(device)


def rotary_table(
    parameters: Mapping[str, Any],
    *,
    head_size: int,
    max_position_embeddings: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """Cosines and sines for every position.

    transformers lets two scalings follow the length of each sequence, which no table can, nor a
    cache of rotated keys. Here as in vLLM they follow the engine's context: ``dynamic`` is scaled
    for its longest one (``max_position_embeddings * factor``) at every length, so that no memory
    option changes a token; ``longrope`` takes the long factors if ``length`` is above the
    original context, else the short ones.

    Args:
        parameters: ``rope_parameters`` of the Hugging Face config: ``rope_type``,
            ``rope_theta`` and the parameters of the type.
        head_size: Channels of a head.
        max_position_embeddings: The config's; the scalings fall back on it.
        length: Positions to tabulate.
        device: Where the table lives.

    Returns:
        [length, R] float32, R the rotated channels: cosines in the first half of the columns,
        sines in the second.

    Raises:
        ModelError: The scaling type is not supported, or a parameter is out of range.
    """
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _OF_TYPE:
        raise ModelError(f"rope_type={kind!r} is not supported; supported: {', '.join(_OF_TYPE)}")
    share = _number(parameters, "partial_rotary_factor", 1.0)
    rotated = int(head_size * share)
    if rotated < 2 or rotated % 2 or rotated > head_size:
        raise ModelError(
            f"rope_parameters partial_rotary_factor={share!r} of head_dim={head_size} gives "
            f"{rotated} channels; it must give an even number from 2 to {head_size}"
        )
    theta = _number(parameters, "rope_theta")
    magnitude = 1.0
    if kind == "dynamic":
        theta = _dynamic(parameters, theta, rotated, max_position_embeddings)
    exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = 1.0 / theta**exponent
    if kind == "linear":
        frequencies = frequencies / _number(parameters, "factor")
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind == "yarn":
        frequencies, magnitude = _yarn(
            frequencies, parameters, theta, rotated, max_position_embeddings
        )
    elif kind == "longrope":
        frequencies, magnitude = _longrope(frequencies, parameters, max_position_embeddings, length)
    if not bool(frequencies.isfinite().all()) or not math.isfinite(magnitude):
        raise ModelError(
            f"rope_parameters={dict(parameters)!r} give frequencies that are no finite numbers"
        )
    table = torch.empty(length, rotated, dtype=torch.float32)
    for begin in range(0, length, _CHUNK):
        end = min(begin + _CHUNK, length)
        angles = torch.arange(begin, end).float().unsqueeze(1) * frequencies
        torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), -1, out=table[begin:end])
    return table.to(device)


def _number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _MOST:
        raise ModelError(
            f"rope_parameters {name}={value!r} must be a number above 0 and below {_MOST:g} for "
            f"rope_type={parameters.get('rope_type', 'default')!r}"
        )
    return float(value)


def _stretch(parameters: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, float]:
    """The original context, and the factor by which it is stretched."""
    original = _number(parameters, "original_max_position_embeddings", max_position_embeddings)
    return original, _number(parameters, "factor", max_position_embeddings / original)


def _dynamic(
    parameters: Mapping[str, Any], theta: float, rotated: int, max_position_embeddings: int
) -> float:
    """The base of NTK-aware scaling (bloc97, emozilla 2023) at the longest context."""
    factor = _number(parameters, "factor")
    if rotated <= 2:
        raise ModelError(f"rope_type='dynamic' rotates more than head_dim={rotated} channels")
    longest = context_length(parameters, max_position_embeddings)
    stretch = factor * longest / max_position_embeddings - (factor - 1)
    return theta * stretch ** (rotated / (rotated - 2))


def _longrope(
    frequencies: Tensor, parameters: Mapping[str, Any], max_position_embeddings: int, length: int
) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024): a factor for each frequency, and an attention scale."""
    original, factor = _stretch(parameters, max_position_embeddings)
    factors = {}
    for name in ("short_factor", "long_factor"):
        values = parameters.get(name)
        if not isinstance(values, list | tuple) or len(values) != len(frequencies):
            raise ModelError(
                f"rope_parameters {name}={values!r} must be a list of {len(frequencies)} numbers "
                "for rope_type='longrope'"
            )
        factors[name] = [_number({**parameters, name: each}, name) for each in values]
    chosen = torch.tensor(
        factors["long_factor" if length > original else "short_factor"], dtype=torch.float32
    )
    magnitude = 1.0
    if factor > 1:
        if original <= 1:
            raise ModelError(
                f"rope_parameters original_max_position_embeddings={original!r} must be above 1 "
                "for rope_type='longrope'"
            )
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies / chosen, _number(parameters, "attention_factor", magnitude)


def _llama3(frequencies: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's scaling (Llama team 2024): long wavelengths are stretched, short ones kept."""
    factor = _number(parameters, "factor")
    low = _number(parameters, "low_freq_factor")
    high = _number(parameters, "high_freq_factor")
    original = _number(parameters, "original_max_position_embeddings")
    wavelength = 2 * math.pi / frequencies
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    blended = (1 - keep) * frequencies / factor + keep * frequencies
    stretched = torch.where(wavelength > original / low, frequencies / factor, blended)
    return torch.where(wavelength < original / high, frequencies, stretched)


def _yarn(
    frequencies: Tensor,
    parameters: Mapping[str, Any],
    theta: float,
    rotated: int,
    max_position_embeddings: int,
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): NTK-by-parts interpolation (eq. 23) and attention scale (eq. 22)."""
    original, factor = _stretch(parameters, max_position_embeddings)
    if theta <= 1:
        raise ModelError(f"rope_parameters rope_theta={theta} must be above 1 for rope_type='yarn'")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        scales = _number(parameters, "mscale"), _number(parameters, "mscale_all_dim")
        magnitude = _magnitude(factor, scales[0]) / _magnitude(factor, scales[1])
    else:
        magnitude = _magnitude(factor, 1.0)
    magnitude = _number(parameters, "attention_factor", magnitude)

    def channel(rotations: float) -> float:
        """The channel whose wavelength fits ``rotations`` times into the original context."""
        return rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = channel(_number(parameters, "beta_fast", 32.0))
    high = channel(_number(parameters, "beta_slow", 1.0))
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool | None):
        raise ModelError(f"rope_parameters truncate={truncate!r} must be true or false")
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotated // 2).float() - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), magnitude


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

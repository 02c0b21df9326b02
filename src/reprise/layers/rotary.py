"""Rotary position embedding and the rescalings of it that checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.errors import ModelError


def rotary_table(
    parameters: Mapping[str, Any],
    *,
    head_size: int,
    max_position_embeddings: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """Cosines and sines for every position.

    Args:
        parameters: ``rope_parameters`` of the Hugging Face config: ``rope_type``,
            ``rope_theta`` and the parameters of the type.
        head_size: Channels of a head.
        max_position_embeddings: The config's; YaRN falls back on it.
        length: Positions to tabulate.
        device: Where the table lives.

    Returns:
        [length, R] float32, R the rotated channels: cosines in the first half of the columns,
        sines in the second.

    Raises:
        ModelError: The scaling type is not supported.
    """
    kind = parameters.get("rope_type", "default")
    rotated = int(head_size * _number(parameters, "partial_rotary_factor", 1.0))
    theta = _number(parameters, "rope_theta")
    exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = 1.0 / theta**exponent
    magnitude = 1.0
    if kind == "linear":
        frequencies = frequencies / _number(parameters, "factor")
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind == "yarn":
        frequencies, magnitude = _yarn(
            frequencies, parameters, theta, rotated, max_position_embeddings
        )
    elif kind != "default":
        raise ModelError(
            f"rope_type={kind!r} is not supported; supported: default, linear, llama3, yarn"
        )
    angles = torch.arange(length).float().unsqueeze(1) * frequencies
    return torch.cat((angles.cos() * magnitude, angles.sin() * magnitude), dim=-1).to(device)


def _number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or value <= 0:
        raise ModelError(
            f"rope_parameters {name}={value!r} must be a number above 0 for "
            f"rope_type={parameters.get('rope_type', 'default')!r}"
        )
    return float(value)


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
    original = _number(parameters, "original_max_position_embeddings", max_position_embeddings)
    factor = _number(parameters, "factor", max_position_embeddings / original)
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
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotated // 2).float() - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), magnitude


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

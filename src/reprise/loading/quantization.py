"""Find what a checkpoint says of its quantisation, wherever it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reprise.errors import ConfigError, ModelError
from reprise.layers.formats import reader_of
from reprise.loading.files import read_object

_READ = "quantization_config"
"""The field that formats are read from (:func:`reprise.layers.formats.formats_of`)."""
_OLDER = "compression_config"
"""Of compressed-tensors, before it took the other."""
_BESIDE = ("expert_dtype",)
"""Fields of the config itself that say more of it, as DeepSeek-V4 is released. transformers moves
them into it since 5.24."""
_ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
"""vLLM's names of kernels for a method."""
_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files of older tools, and of ModelOpt, that say it beside the config; and whose they are."""


def with_quantization(
    path: Path, raw: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of a checkpoint with its ``quantization_config``, if it is quantised.

    Args:
        path: Of the checkpoint.
        raw: Its config, as JSON has it, overrides laid over it.
        overrides: With ``quantization_config=None`` they say that weights are plain.

    Raises:
        ModelError: Its weights are in a format that cannot be read. Names the method and where it
            was found.
    """
    found = dict(raw)
    if _READ in overrides and overrides[_READ] is None:
        return found
    place, value = _found(path, raw)
    if value is None:
        return found
    if not isinstance(value, Mapping) or reader_of(value.get("quant_method")) is None:
        raise ModelError(
            f"{path}: the checkpoint is quantised with {_method(value)!r} ({place}), which is not "
            "supported; use the checkpoint that it was made from, or hf_overrides="
            "{'quantization_config': None} if its weights are plain floating-point numbers"
        )
    found.pop(_OLDER, None)
    beside = {name: raw[name] for name in _BESIDE if raw.get(name) is not None}
    found[_READ] = {**beside, **value}
    return found


def require_method(asked: str | None, config: Any) -> None:
    """Refuse a checkpoint that is not quantised as the user says it is.

    Args:
        asked: ``quantization`` of the options.
        config: transformers' ``PretrainedConfig``.

    Raises:
        ConfigError: Names both, and the remedy.
    """
    value = getattr(config, _READ, None)
    method = None if value is None else value["quant_method"]
    if asked is None or _ALIASES.get(asked, asked) == method:
        return
    if method is None:
        raise ConfigError(
            f"quantization={asked!r}: the checkpoint's weights are plain, and nothing is quantised "
            "while it is loaded; use a checkpoint that is, or make one with "
            "tools/quantize_checkpoint.py"
        )
    raise ConfigError(
        f"quantization={asked!r}: the checkpoint is quantised with {method!r}; leave the option out"
    )


def _found(path: Path, raw: Mapping[str, Any]) -> tuple[str, Any]:
    """Where it is, and what is there; None: nowhere."""
    for field in (_READ, _OLDER):
        if raw.get(field) is not None:
            return f"config field {field}", raw[field]
    for name, tool in _FILES.items():
        if (path / name).exists():
            try:
                return name, {"quant_method": tool, **read_object(path / name)}
            except (OSError, ValueError) as error:
                raise ModelError(f"{path / name} is not valid: {error}") from error
    return "", None


def _method(value: Any) -> str:
    if not isinstance(value, Mapping):
        return repr(value)
    method = value.get("quant_method")
    if method is None and (value.get("load_in_4bit") or value.get("load_in_8bit")):
        return "bitsandbytes"
    algorithm = value.get("quant_algo") or value.get("format")
    return str(method or algorithm or "no named method") + (
        f" {value['bits']} bits" if isinstance(value.get("bits"), int) else ""
    )

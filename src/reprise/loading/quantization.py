"""Recognise quantised checkpoints, wherever their method is written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reprise.errors import ModelError
from reprise.layers.formats import reader_of

_READ = "quantization_config"
"""The field that formats are read from (:func:`reprise.layers.formats.formats_of`)."""
_FIELDS = (_READ, "compression_config")
_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files of older tools, and of ModelOpt, that say it beside the config; and whose they are."""


def refuse_unknown_methods(
    path: Path, raw: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint whose weights are in a format that cannot be read.

    Args:
        path: Of the checkpoint.
        raw: Its config, as JSON has it, overrides laid over it.
        overrides: With ``quantization_config=None`` they say that weights are plain.

    Raises:
        ModelError: Names the method and where it was found.
    """
    if "quantization_config" in overrides and overrides["quantization_config"] is None:
        return
    for place, method in _found(path, raw):
        raise ModelError(
            f"{path}: the checkpoint is quantised with {method!r} ({place}), which is not "
            "supported; use the checkpoint that it was made from, or hf_overrides="
            "{'quantization_config': None} if its weights are plain floating-point numbers"
        )


def _found(path: Path, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in _FIELDS:
        value = raw.get(field)
        if value is not None and not (field == _READ and _is_known(value)):
            yield f"config field {field}", _method(value)
    for name, tool in _FILES.items():
        if (path / name).exists():
            yield name, tool


def _is_known(value: Any) -> bool:
    return isinstance(value, Mapping) and reader_of(value.get("quant_method")) is not None


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

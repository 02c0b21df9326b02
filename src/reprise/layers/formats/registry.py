"""The name of a quantisation method, as checkpoints spell it, to the file that knows it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from reprise.errors import ModelError
from reprise.layers.formats.base import Formats
from reprise.layers.formats.dense import PLAIN

ENTRY_POINT_GROUP = "reprise.formats"

_BUILT_IN: dict[str, str] = {
    "awq": "reprise.layers.formats.awq",
    "compressed-tensors": "reprise.layers.formats.compressed_tensors",
    "fp8": "reprise.layers.formats.fp8",
    "gptq": "reprise.layers.formats.gptq",
}
"""``quant_method`` to a module with a function ``formats`` (:func:`formats_of` says which)."""


Reader = Callable[[Mapping[str, Any]], Formats]


def reader_of(method: Any) -> Reader | None:
    """What reads the ``quantization_config`` of a method, its file imported; None: not known."""
    if not isinstance(method, str):
        return None
    if method in _BUILT_IN:
        read: Reader = importlib.import_module(_BUILT_IN[method]).formats
        return read
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=method):
        found: Reader = entry.load()
        return found
    return None


def formats_of(quantization_config: Mapping[str, Any] | None) -> Formats:
    """The formats of a checkpoint's weights.

    The file of a method has a function ``formats`` that takes such a mapping and raises a
    ModelError for each field in it that it does not know or cannot follow.

    Args:
        quantization_config: As the checkpoint's config has it; None: it is not quantised.

    Raises:
        ModelError: The method is not known, or asks for what its file does not know.
    """
    if quantization_config is None:
        return PLAIN
    method = quantization_config.get("quant_method")
    read = reader_of(method)
    if read is None:
        plug_ins = (entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
        known = sorted({*_BUILT_IN, *plug_ins})
        raise ModelError(
            f"quantization_config has quant_method={method!r}, which is not supported; "
            f"supported: {', '.join(known) or 'none'}"
        )
    return read(quantization_config)

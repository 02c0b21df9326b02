"""The name of a quantisation method, as checkpoints spell it, to the file that knows it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from reprise.errors import ModelError
from reprise.layers.formats.base import Formats
from reprise.layers.formats.dense import PLAIN

ENTRY_POINT_GROUP = "reprise.formats"

_BUILT_IN: dict[str, str] = {}
"""``quant_method`` to a module with a function ``formats`` (:func:`formats_of` says which)."""


def methods() -> list[str]:
    """Every ``quant_method`` that can be read, plug-ins included."""
    plug_ins = (entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
    return sorted({*_BUILT_IN, *plug_ins})


def formats_of(quantization_config: Mapping[str, Any] | None) -> Formats:
    """The formats of a checkpoint's weights.

    The file of a method has a function ``formats`` that takes such a mapping and raises a
    ModelError for each field in it that it does not know or cannot follow.

    Args:
        quantization_config: As the checkpoint's config has it; None: it is not quantised.

    Raises:
        ModelError: The method is not known.
    """
    if quantization_config is None:
        return PLAIN
    method = quantization_config.get("quant_method")
    if method in _BUILT_IN:
        read = importlib.import_module(_BUILT_IN[method]).formats
    else:
        found = list(entry_points(group=ENTRY_POINT_GROUP, name=method)) if method else []
        if not found:
            raise ModelError(
                f"quantization_config has quant_method={method!r}, which is not supported; "
                f"supported: {', '.join(methods()) or 'none'}"
            )
        read = found[0].load()
    formats: Formats = read(quantization_config)
    return formats

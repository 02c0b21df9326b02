"""Read JSON objects of a checkpoint, whatever lies there."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

_DEEPEST = 64
"""Levels of a JSON file. One more and reading it, or showing what is wrong, may not end well."""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else, or is no regular file.
    """
    require_regular(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    level = [content]
    for _ in range(_DEEPEST):
        level = [below for each in level for below in _within(each)]
    if level:
        raise ValueError("its brackets are nested too deeply")
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is expected, not {str(content)[:100]!r}")
    return content


def require_regular(file: Path) -> None:
    """Refuse what would hang a reader, such as a FIFO.

    Raises:
        OSError: There is nothing, or it cannot be looked at.
        ValueError: It is no regular file, nor a link to one.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"it is {'a directory' if stat.S_ISDIR(mode) else 'a FIFO or a device'}, not a file"
        )


def _within(value: Any) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()

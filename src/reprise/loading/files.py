"""Read JSON objects of a checkpoint, whatever lies there."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

_DEEPEST = 64
"""Levels of a JSON file. One more and reading it, or showing what is wrong, may not end well."""


_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024
"""Bytes, by the specification of Git LFS."""


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
    """Refuse what would hang a reader, such as a FIFO, and what a clone without Git LFS leaves.

    Raises:
        OSError: There is nothing, or it cannot be looked at.
        ValueError: It is no regular file, nor a link to one, or only says which file it stands for.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        is_directory = stat.S_ISDIR(status.st_mode)
        raise ValueError(
            f"it is {'a directory' if is_directory else 'a FIFO or a device'}, not a file"
        )
    if status.st_size > _LONGEST_POINTER:
        return
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                "it is a pointer of Git LFS, without the content: run 'git lfs pull' in the "
                "checkpoint's directory, or download it again"
            )


def _within(value: Any) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()

"""Files that options name."""

from __future__ import annotations

from pathlib import Path

import typer


def output_file(path: Path | None) -> Path | None:
    """Callback of an option: refuse at once what could not be written in the end.

    Raises:
        typer.BadParameter: No file can be written there.
    """
    if path is None:
        return None
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{str(path.parent)!r} is not a directory")
    try:
        target = path.resolve()
        existed = target.exists()
        if existed and not target.is_file():
            return path  # a pipe or a device; its reader would take a trial for the end
        with target.open("ab"):
            pass
        if not existed:
            target.unlink()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {str(path)!r}: {error.strerror}") from None
    return path

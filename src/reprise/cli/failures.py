"""What the user sees when a command fails: one line, and an exit status."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from reprise.errors import RepriseError

EXIT_ERROR = 2
"""The input or the environment is at fault; typer exits with it for wrong usage as well."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""128 and the number of the signal, as shells report a program that a signal ended."""


@contextmanager
def reported(debug: bool, flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn failures of the block into a line on standard error and an exit status.

    Args:
        debug: Print the traceback of an error in place of the line.
        flags: As in :func:`in_flags`.

    Raises:
        SystemExit: Instead of the failure. It works within click and outside of it.
    """
    try:
        yield
    except RepriseError as error:
        _report(in_flags(str(error), flags or {}), debug)
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        import typer

        typer.secho("\ninterrupted", err=True, dim=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has left, as head does.
        _discard_unwritten()
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        about = "" if error.filename is None else f"{error.filename}: "
        _report(f"{about}{error.strerror or error}", debug)
        _discard_unwritten()
        raise SystemExit(EXIT_ERROR) from None


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error's text with the names of fields, as Python's users give them, as flags.

    Args:
        message: Such as ``max_num_seqs=0 must be a positive whole number``.
        flags: Field name to flag. A name that is an ordinary word is a field only before ``=``.
    """
    for name, flag in flags.items():
        field = re.escape(name)
        # Switches take no value.
        off = f"--no-{flag.removeprefix('--')}"
        message = re.sub(rf"(?<![\w./-]){field}=True\b", flag, message)
        message = re.sub(rf"(?<![\w./-]){field}=False\b", off, message)
        behind = r"(?!\w)" if "_" in name else "(?==)"
        message = re.sub(rf"(?<![\w./-]){field}{behind}", flag, message)
    return message


def _report(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    else:
        print_error(message)


def _discard_unwritten() -> None:
    """What standard output does not take is lost: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(message: str) -> None:
    """``error: ...`` on one line of standard error."""
    # Here, as Ctrl-C may come while it is imported.
    import typer

    typer.secho("error: ", err=True, fg=typer.colors.RED, bold=True, nl=False)
    typer.secho(" ".join(message.split()), err=True, fg=typer.colors.RED)

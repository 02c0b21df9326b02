"""What the user sees when a command fails: one line, and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from reprise.errors import RepriseError

EXIT_ERROR = 2
"""The input or the environment is at fault; typer exits with it for wrong usage as well."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""128 and the number of the signal, as shells report a program that a signal ended."""


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn failures of the block into a line on standard error and an exit status.

    Args:
        debug: Let a :class:`RepriseError` pass, so that Python prints its traceback.
    """
    try:
        yield
    except RepriseError as error:
        if debug:
            raise
        print_error(str(error))
        raise typer.Exit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        typer.secho("\ninterrupted", err=True, dim=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has left, as head does. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_BROKEN_PIPE) from None


def print_error(message: str) -> None:
    """``error: ...`` on one line of standard error."""
    typer.secho("error: ", err=True, fg=typer.colors.RED, bold=True, nl=False)
    typer.secho(" ".join(message.split()), err=True, fg=typer.colors.RED)

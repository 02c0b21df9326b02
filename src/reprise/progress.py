"""Progress bars for work that may take longer than two seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SHOW_AFTER_SECONDS = 1.0
SAYS_TERMINAL = {"FORCE_COLOR", "TTY_COMPATIBLE"}
"""By these of the environment rich may take for a terminal what is none."""


class Counter:
    """Counts finished parts of a piece of work; the bar appears once the work takes long.

    Args:
        what: What the work is called.
        total: Its number of parts; 0 if that is known only with the first :meth:`show`.
        visible: Whether the bar may appear. It does so on a terminal only.
        at_once: Do not wait until the work turns out to take long.
    """

    def __init__(self, what: str, total: int, visible: bool = True, at_once: bool = False) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._earliest = time.perf_counter() + (0 if at_once else SHOW_AFTER_SECONDS)
        self._visible = visible and _on_a_terminal()
        self._bar: Progress | None = None
        if at_once:
            self.advance(0)

    def advance(self, parts: int = 1) -> None:
        """Some more parts are done."""
        self.show(self.what, self.done + parts, self.total)

    def show(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of ``what`` are done."""
        self.what, self.done, self.total = what, done, total
        if self._bar is None:
            if time.perf_counter() < self._earliest or not self._visible:
                return
            self._bar = _bar()
            self._bar.start()
            self._bar.add_task(self.what, total=self.total)
        self._bar.update(
            self._bar.task_ids[0], description=what, completed=self.done, total=self.total
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _on_a_terminal() -> bool:
    try:
        may_be = sys.stderr.isatty() or not os.environ.keys().isdisjoint(SAYS_TERMINAL)
    except (AttributeError, ValueError):  # there is no standard error, or it is closed
        return False
    if not may_be:
        return False
    from rich.console import Console

    return Console(file=sys.stderr).is_terminal


def _bar() -> Progress:
    # Not where the module is imported, which every start of an engine does: few show a bar.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )


@contextmanager
def progress(
    what: str, total: int, visible: bool = True, at_once: bool = False
) -> Iterator[Counter]:
    """Show a bar on standard error with a count and an estimate, if the block takes long.

    Args: As for :class:`Counter`.
    """
    counter = Counter(what, total, visible, at_once)
    try:
        yield counter
    finally:
        counter.close()

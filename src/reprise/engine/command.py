"""What others want done in an engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from reprise.errors import RepriseError, describe


class Command:
    """What the engine's thread is to do between two steps.

    Args:
        function: Does it.
        future: Gets the result or the exception, which then concerns its owner alone; None: no
            thread waits, and exceptions were dealt with.
    """

    def __init__(self, function: Callable[[], Any], future: Future[Any] | None = None) -> None:
        self._function = function
        self._future = future

    def run(self) -> None:
        if self._future is not None and not self._future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except Exception as error:
            self._refuse(error)
        except BaseException as error:
            self._refuse(RepriseError(f"the engine's thread ended ({describe(error)})"))
            raise
        else:
            if self._future is not None:
                self._future.set_result(result)

    def refuse(self, error: Exception) -> None:
        """End the command, which will not be carried out, with an error."""
        if self._future is None or self._future.set_running_or_notify_cancel():
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if self._future is not None:
            self._future.set_exception(error)

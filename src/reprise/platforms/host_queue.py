"""Stream and event of a device that has finished work when it has been submitted."""

from __future__ import annotations

import time
from typing import Any


class HostEvent:
    """An event of a device whose work is finished when it has been submitted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to ``end``."""
        return (end.seconds - self.seconds) * 1e3


class HostStream:
    """A stream of a device whose work is finished when it has been submitted."""

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

"""Passes that are made for what each kind of op call needs, and not for their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


def rehearsing() -> bool:
    """What this thread computes now is not used: of parts that make the same calls, one is enough.
    Calls are the same if a kernel that is compiled for one is compiled for the other."""
    return _rehearsing.get()


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """In the ``with`` block :func:`rehearsing` is true. All memory that a whole pass takes at a
    time is taken there too."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)

"""Where the time goes while an engine starts: named spans, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class _Recording:
    seconds: dict[str, float] = field(default_factory=dict)
    inner: float = 0.0
    """Spent in the spans inside the current one."""


_current: ContextVar[_Recording | None] = ContextVar("timeline", default=None)


@contextmanager
def recording() -> Iterator[dict[str, float]]:
    """Collect the spans of this block in the dictionary that it yields, in their order."""
    token = _current.set(_Recording())
    try:
        current = _current.get()
        assert current is not None
        yield current.seconds
    finally:
        _current.reset(token)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Count this block's time under ``name``, if spans are being recorded.

    A span inside another one counts under its own name alone, so the spans add up.
    """
    current = _current.get()
    if current is None:
        yield
        return
    outer, current.inner = current.inner, 0.0
    began = time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - began
        current.seconds[name] = current.seconds.get(name, 0.0) + elapsed - current.inner
        current.inner = outer + elapsed

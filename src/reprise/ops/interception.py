"""Functions that are called in the place of an op's implementation."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

Interceptor = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called instead of an op's implementation: ``interceptor(op, function, args, kwargs)``."""

interceptor: contextvars.ContextVar[Interceptor | None] = contextvars.ContextVar(
    "interceptor", default=None
)
"""Of this thread's calls; None: the implementations are called."""


@contextlib.contextmanager
def intercept(instead: Interceptor | None) -> Iterator[None]:
    """Hand the op calls of this thread, compiled code's included, to ``instead``.

    This is how graph executors see break ops. None: call the implementations again.
    """
    token = interceptor.set(instead)
    try:
        yield
    finally:
        interceptor.reset(token)

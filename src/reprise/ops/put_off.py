"""Work that ops put off until its result is needed, where their caller says that no code looks.

A step of few rows waits for its weights, and while a kernel reads megabytes of them the interpreter
is driven out of the processor's cache. Called one by one, kernels of a small model wait longer for
the Python between them than that takes by itself. So a caller that only hands on what ops give
(:func:`together`) lets those that can put their work down in a list, and all of it runs at its end,
in order, without Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from reprise.ops.interception import interceptor

T = TypeVar("T")


class Waiting(Protocol):
    """Work that was put off, with all memory that it needs."""

    def run(self) -> None:
        """Do it, in order. Raises what the calls would have raised."""


class _Thread(threading.local):
    open: bool = False
    """The thread is in a ``with`` block of :func:`together`."""
    waiting: Waiting | None = None


here = _Thread()
_marked: list[str] = []
"""Names of implementations that put work off. Where none was imported, as in a process that only
computes on a device, no block is opened: each call would have to close it and open it again."""


def forget() -> None:
    """Nothing waits in this thread, and it is in no block: an interrupt may have come where one was
    open already and not yet sure to be closed."""
    here.open, here.waiting = False, None


class together:
    """In the ``with`` block the thread calls ops and looks at no number that they compute.

    Views and new tensors are no looking. What is put off runs when the block ends, or before an
    implementation that puts nothing off is called. Where calls are watched (recorded, compiled,
    intercepted), nothing is put off. After an exception what still waits is forgotten.
    """

    __slots__ = ("_opened",)

    def __enter__(self) -> None:
        self._opened = bool(_marked) and not (
            here.open or torch._C._len_torch_dispatch_stack() or interceptor.get() is not None
        )
        if self._opened:
            here.open = True

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._opened:
            here.open = False
            waiting, here.waiting = here.waiting, None
            if waiting is not None and kind is None:
                waiting.run()


def aside(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function that looks at tensors, or calls ops and does, behind all that waits."""
    if not here.open:
        return function(*args, **kwargs)
    waiting, here.waiting = here.waiting, None
    here.open = False
    try:
        if waiting is not None:
            waiting.run()
        return function(*args, **kwargs)
    finally:
        here.open = True


def puts_off(function: Callable[..., T]) -> Callable[..., T]:
    """Marks an implementation of which all that reads or writes tensors is put off, or aside."""
    function.puts_off = True  # type: ignore[attr-defined]
    _marked.append(function.__qualname__)
    return function

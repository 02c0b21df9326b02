"""Threads that make texts into tokens, beside the one that computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LONG = 1 << 16
"""Characters that take longer to tokenize than another request is to wait: a twentieth of a second
and more."""
EACH = 32
"""That many characters take as long as what is done for a text beside, however short."""
LONG_AT_ONCE = 2


def is_long(*values: Any) -> bool:
    """Whether it takes long to look through these, and to tokenize the texts that are in them.

    Args:
        *values: Texts, lists and dictionaries of them, and what else a caller gave. They are looked
            through as far as it takes to know, which is not long.
    """
    size, left = 0, [iter(values)]
    while left:
        for each in left[-1]:
            ids = isinstance(each, list) and each and type(each[0]) is int  # of tokens, all of it
            size += EACH + len(each) if isinstance(each, str) else len(each) if ids else 1
            if size > LONG:
                return True
            if isinstance(each, Mapping | list | tuple) and not ids:
                left.append(iter(each.values() if isinstance(each, Mapping) else each))
                break
        else:
            left.pop()
    return False


class Tokenizing:
    """Texts that are long have threads of their own, so that no other waits for them: one of tens
    of megabytes takes minutes."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "reprise-tokenizer")
        self._long = ThreadPoolExecutor(LONG_AT_ONCE, "reprise-tokenizer-long")

    def submit(self, function: Callable[[], T], long: bool) -> Future[T]:
        """Run it in one of the threads.

        Args:
            long: As :func:`is_long` says of what it is done with.
        """
        return (self._long if long else self._short).submit(function)

    def shutdown(self) -> None:
        """Nothing more is begun behind what was submitted; the threads end then."""
        self._short.shutdown(wait=False)
        self._long.shutdown(wait=False)

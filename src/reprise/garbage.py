"""When Python looks for garbage in cycles: not while much is made that stays."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

YOUNG_OBJECTS = 20_000
"""New objects that are looked through for garbage at once in a process that serves."""

_lock = threading.Lock()
_blocks = 0
"""``with`` blocks under way, in any thread, in which the collector must not run."""
_was_enabled = False
_others_freeze = False
"""Other code has been seen to freeze objects."""


class _Thread(threading.local):
    blocks = 0
    """``with`` blocks that this thread is in."""


_here = _Thread()


def _after_fork() -> None:
    """Threads that were in a block are not there to end it, nor to give the lock back."""
    global _lock, _blocks
    before, _blocks, _lock = _blocks, _here.blocks, threading.Lock()
    if before and _blocks == 0 and _was_enabled:
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is looked through for garbage in the block, unless code calls ``gc.collect``.

    An import or a start makes some hundred thousand objects that stay. Each time their number has
    grown by a quarter Python goes through all, torch's included, which takes a tenth of a second.
    """
    global _blocks, _was_enabled
    with _lock:
        if _blocks == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _blocks += 1
        _here.blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            _here.blocks -= 1
            if _blocks == 0 and _was_enabled:
                _take_for_old()
                gc.enable()


def settle() -> None:
    """What a process that does nothing but serve has made so far stays until it ends, so that it is
    never looked through again: of an engine that takes a tenth of a second, at any time, for which
    all streams wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def _take_for_old() -> None:
    """All objects are of the oldest generation, without being looked through: else the next ones to
    be made bring the collector to go through all of these. Not where other code has frozen objects,
    which would thaw: to count those is to go through them, so that is done once."""
    global _others_freeze
    _others_freeze = _others_freeze or gc.get_freeze_count() > 0
    if not _others_freeze:
        gc.freeze()
        gc.unfreeze()

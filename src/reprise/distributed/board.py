"""Memory that all ranks of one machine share: how far each rank is, what they agree on, what
failed.

It has no name in any file system: the leader makes it and hands its file descriptor on, so nothing
is left behind however the processes end.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from reprise.errors import RanksError

_WORDS = 32
"""Of eight bytes, of each rank: four cache lines."""
_TEXT_BYTES = 1 << 14
(
    _ALIVE, _TAIL, _ASKED, _ASLEEP, _MESSAGES, _STEPS, _FAILED, _FAILED_AT, _CALLS, _SEEN,
) = range(10)  # fmt: skip
_FIRST, _SECOND = 16, 24
MOST_NUMBERS = 8
"""Of one question."""
SPIN_SECONDS = 0.002
"""For so long a rank that waits stays awake."""
NAP_SECONDS = 0.0005


def create(nbytes: int) -> int:
    """A file descriptor of shared memory without a name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("reprise")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, nbytes)
    return descriptor


class Board:
    """One process's view of the shared memory.

    Args:
        descriptor: Of :func:`create`, which had :meth:`nbytes`; the board has its own copy of it.
        rank: Ours.
        size: Ranks there are.
        ring_bytes: Of the messages that are on their way.
    """

    def __init__(self, descriptor: int, rank: int, size: int, ring_bytes: int) -> None:
        self.rank, self.size = rank, size
        self._map = mmap.mmap(descriptor, self.nbytes(size, ring_bytes))
        self._view = memoryview(self._map)
        words = 8 * _WORDS * (1 + size)
        self._words = self._view[:words].cast("Q")
        self._numbers = self._view[:words].cast("d")
        texts = words + _TEXT_BYTES * size
        self._texts = self._view[words:texts]
        self.ring = self._view[texts:]
        """Bytes of messages; see :mod:`reprise.distributed.ring`."""
        self._fence_lock = threading.Lock()
        self._asked = 0
        self._fell_out: str | None = None
        self.timeout = 600.0
        """Seconds that a rank waits for an answer of the others."""
        self.alike = True
        """See :class:`reprise.distributed.Agreement`."""

    @staticmethod
    def nbytes(size: int, ring_bytes: int) -> int:
        """Bytes of the memory that a board needs."""
        return 8 * _WORDS * (1 + size) + _TEXT_BYTES * size + ring_bytes

    def close(self) -> None:
        """Give up the view."""
        for each in (self._words, self._numbers, self._texts, self.ring, self._view):
            each.release()
        self._map.close()

    def fence(self) -> None:
        """What was written before is seen before what is written after: taking a lock is a barrier
        on every processor."""
        with self._fence_lock:
            pass

    # ---- words of the leader and of each rank --------------------------------------------

    @property
    def head(self) -> int:
        """Bytes that the leader has written to the ring so far."""
        return self._words[0]

    @head.setter
    def head(self, value: int) -> None:
        self.fence()
        self._words[0] = value
        self.fence()

    @property
    def sent(self) -> int:
        """Messages that the leader has written so far."""
        return self._words[1]

    @sent.setter
    def sent(self, value: int) -> None:
        self._words[1] = value

    @property
    def ended(self) -> bool:
        """The group is over: no rank is to wait for another one."""
        return bool(self._words[2])

    def end(self) -> None:
        self._words[2] = 1

    def _of(self, rank: int, word: int) -> int:
        return self._words[(1 + rank) * _WORDS + word]

    def _set(self, word: int, value: int, rank: int | None = None) -> None:
        self._words[(1 + (self.rank if rank is None else rank)) * _WORDS + word] = value

    def tail(self, rank: int) -> int:
        """Bytes that a rank has read."""
        return self._of(rank, _TAIL)

    def read_up_to(self, tail: int) -> None:
        self.fence()
        self._set(_TAIL, tail)

    def beat(self) -> None:
        """Say that this process runs."""
        self._set(_ALIVE, self._of(self.rank, _ALIVE) + 1)

    def beats(self, rank: int) -> int:
        """Changes while a rank's process runs."""
        return self._of(rank, _ALIVE)

    def received(self, rank: int) -> int:
        """Messages that a rank has taken."""
        return self._of(rank, _MESSAGES)

    def note_received(self, count: int) -> None:
        self._set(_MESSAGES, count)

    def done(self, rank: int) -> int:
        """Messages that a rank has carried out."""
        return self._of(rank, _STEPS)

    def note_done(self, count: int) -> None:
        self._set(_STEPS, count)

    def note_calls(self, count: int) -> None:
        """Say how many collectives this rank has begun."""
        self._set(_CALLS, count)

    def calls(self, rank: int) -> int:
        """Collectives that a rank has begun."""
        return self._of(rank, _CALLS)

    def asleep(self, rank: int) -> bool:
        """A rank has to be woken when there is a message."""
        return bool(self._of(rank, _ASLEEP))

    def fall_asleep(self, asleep: bool) -> None:
        self._set(_ASLEEP, int(asleep))
        self.fence()

    # ---- failures ------------------------------------------------------------------------

    def fail(self, error: BaseException | str, seen: int | None = None) -> None:
        """Say what ended this rank, for the others to see; the first one counts.

        Args:
            error: What ended it.
            seen: Another rank, whose process cannot say so itself: it was seen to have ended, or to
                stand still. What others say meanwhile, they say since it is gone.
        """
        rank = self.rank if seen is None else seen
        if self._of(rank, _FAILED):
            return
        text = sendable(error)
        begin = rank * _TEXT_BYTES
        self._texts[begin : begin + len(text)] = text
        self._numbers[(1 + rank) * _WORDS + _FAILED_AT] = time.monotonic()
        self._set(_SEEN, seen is not None, rank)
        self.fence()
        self._set(_FAILED, len(text), rank)

    def failure(self, rank: int) -> Any:
        """The error or the words with which a rank ended; None: it has not."""
        length = self._of(rank, _FAILED)
        if not length:
            return None
        # Of two ranks that have seen its end, one may have written the text and the other one its
        # length: a pickle says itself where it ends.
        begin = rank * _TEXT_BYTES
        return pickle.loads(self._texts[begin : begin + _TEXT_BYTES])

    @property
    def first_failure(self) -> int | None:
        """The rank that failed first, before all others one that was seen to; None: none has."""
        return min(self._failed, key=self._failed_at, default=None)

    def await_first_failure(self) -> int | None:
        """As :attr:`first_failure`: what is written to memory is seen at once."""
        return self.first_failure

    @property
    def _failed(self) -> list[int]:
        return [rank for rank in range(self.size) if self._of(rank, _FAILED)]

    def _failed_at(self, rank: int) -> tuple[bool, float]:
        when = self._numbers[(1 + rank) * _WORDS + _FAILED_AT]
        return not self._of(rank, _SEEN), when

    def check(self) -> None:
        """Raise if the group is over or a rank has failed."""
        if self.ended:
            raise RanksError("the ranks have ended")
        # A rank that others have given up learns it, and by their words.
        ranks = [rank for rank in self._failed if rank != self.rank or self._of(rank, _SEEN)]
        if ranks:
            first = min(ranks, key=self._failed_at)
            raise failed(first, self.failure(first))

    # ---- agreement -----------------------------------------------------------------------

    def all(self, ok: bool) -> bool:
        """See :class:`reprise.distributed.Agreement`."""
        return self.largest(0.0 if ok else 1.0) == 0.0

    def largest(self, value: float) -> float:
        """See :class:`reprise.distributed.Agreement`.

        Raises:
            RanksError: A rank has failed or did not answer in time.
        """
        return self.largest_of([value])[0]

    def fell_out(self, reason: str) -> None:
        """See :class:`reprise.distributed.Agreement`."""
        self._fell_out = reason

    def _check_left(self) -> None:
        """Raise if this rank left a pass and another one goes on in it."""
        if self._fell_out is None:
            return
        own = self._of(self.rank, _CALLS)
        for rank in range(self.size):
            if self._of(rank, _CALLS) > own:
                error = RanksError(
                    f"{self._fell_out}; on this rank alone: rank {rank} waits for it in a "
                    "collective, and the group ends"
                )
                self.fail(error)
                raise error

    @property
    def is_asked(self) -> bool:
        """Another rank has asked what this one has not answered yet."""
        return any(self._of(rank, _ASKED) > self._asked for rank in range(self.size))

    def largest_of(
        self, values: Sequence[float], told: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Of several numbers, at most :data:`MOST_NUMBERS`, the largest that a rank says of each.

        Args:
            values: As many on each rank.
            told: Called when the others can see what this rank says, before it waits for them.

        Raises:
            RanksError: A rank has failed or did not answer in time.
        """
        # A rank that is one question ahead writes to the other words: those who have not read this
        # answer yet still find it.
        asked = self._asked = self._asked + 1
        word = _FIRST if asked % 2 else _SECOND
        count = len(values)
        for number, value in enumerate(values, (1 + self.rank) * _WORDS + word):
            self._numbers[number] = value
        self.fence()
        self._set(_ASKED, asked)
        self.fence()
        told()
        began = time.monotonic()
        for rank in range(self.size):
            while self._of(rank, _ASKED) < asked:
                waited = time.monotonic() - began
                if waited > self.timeout:
                    error = RanksError(
                        f"rank {rank} did not answer within {self.timeout:.0f} s; the group ends"
                    )
                    error.rank = rank
                    self.fail(error, rank)
                    raise error
                self.check()
                self._check_left()
                pause(waited)
        self.fence()
        self._check_left()  # where collectives are left to the device, all may have answered
        self._fell_out = None
        places = [(1 + rank) * _WORDS + word for rank in range(self.size)]
        return [max(self._numbers[each + n] for each in places) for n in range(count)]


def sendable(error: BaseException | str) -> bytes:
    """An error, or what can be said of it, pickled: at most :data:`_TEXT_BYTES`."""
    try:
        text = pickle.dumps(error)
        pickle.loads(text)
    except Exception:  # not every exception can be sent
        text = pickle.dumps(f"{type(error).__name__}: {error}")
    if len(text) > _TEXT_BYTES:
        text = pickle.dumps(str(error)[: _TEXT_BYTES // 8])
    return text


def pause(waited: float) -> None:
    """Between two looks at what another process is to change."""
    if waited < SPIN_SECONDS:
        os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0)
    else:
        time.sleep(NAP_SECONDS)


def failed(rank: int, cause: Any) -> Exception:
    """The error for others with which a rank has ended: of the same type, if it is typed."""
    from reprise.errors import RepriseError

    if isinstance(cause, RanksError) and cause.rank == rank:
        found = RanksError(str(cause))  # what others say of it, by its name
        found.rank = rank
        return found
    if isinstance(cause, RepriseError):
        try:
            return type(cause)(f"rank {rank}: {cause}")
        except TypeError:  # it takes more than a message
            return RanksError(f"rank {rank}: {type(cause).__name__}: {cause}")
    if isinstance(cause, BaseException):
        return RanksError(f"rank {rank}: {type(cause).__name__}: {cause}")
    return RanksError(f"rank {rank}: {cause}")

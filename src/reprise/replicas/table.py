"""Where replicas that share experts sit: the memory and the pipes between them."""

from __future__ import annotations

import itertools
import os
from typing import Any

from torch._C._distributed_c10d import TCPStore

from reprise.distributed.board import Board, create
from reprise.parallel import SharedSeat

TIMEOUT_SECONDS = 300.0
"""A replica that does not come to a step for so long is lost; the first one compiles."""
SETUP: tuple[str, ...] = ()
"""See :attr:`reprise.parallel.Seat.setup`; of all replicas but the first."""
_numbers = itertools.count()


class Table:
    """Has a seat for each replica. Neither the memory nor the pipes have a name: nothing of them is
    left when the processes have ended.

    Args:
        size: Replicas.
        ranks: Of each.
    """

    def __init__(self, size: int, ranks: int) -> None:
        self._ranks = ranks
        self._memory = create(Board.nbytes(size, 0))
        self._everyone = create(Board.nbytes(size * ranks, 0))
        # A process that looks from outside is none of the ranks.
        self._board = Board(self._everyone, 0, size * ranks, 0)
        self._store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [os.pipe() for _ in range(size)]
        for _, waker in pipes:
            os.set_blocking(waker, False)
        self._pipes = [each for pair in pipes for each in pair]
        group = f"data-{os.getpid()}-{next(_numbers)}"
        self.seats = [
            SharedSeat(
                rank, size, ranks, self._memory, self._everyone, pipes[rank][0],
                tuple(-1 if other == rank else pipes[other][1] for other in range(size)),
                group, self._store.port, TIMEOUT_SECONDS, SETUP if rank else (),
            )
            for rank in range(size)
        ]  # fmt: skip
        """Of each replica; plain data, and numbers of descriptors that its process inherits."""

    def taken(self) -> None:
        """All replicas have their descriptors: ours are not needed any more."""
        for each in (self._memory, self._everyone, *self._pipes):
            os.close(each)

    @property
    def first_failure(self) -> tuple[int, str] | None:
        """The replica that has failed first by what its ranks say, and why; None: none says so."""
        first = self._board.first_failure
        if first is None:
            return None
        error = self._board.failure(first)
        told = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
        return first // self._ranks, told


def descriptors(seat: SharedSeat) -> tuple[int, ...]:
    """What a process has to inherit to take the seat."""
    return seat.memory, seat.everyone, seat.woken, *(each for each in seat.wakers if each >= 0)

"""Where an engine sits among others that share experts with it, and how its ranks join theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch._C._distributed_c10d import TCPStore

from reprise.config import EngineConfig
from reprise.distributed import Group
from reprise.distributed.board import Board
from reprise.distributed.communicator import Communicator, connect
from reprise.parallel.direct import NEED_IT, ROWS, prove_direct
from reprise.platforms import Platform


@dataclass(frozen=True)
class Seat:
    """What one of the engines has to know of the others; plain data."""

    rank: int
    size: int
    ranks: int
    """Of each engine."""
    memory: int
    """File descriptor of the board of engines."""
    everyone: int
    """File descriptor of the board of all ranks of all engines."""
    woken: int
    """File descriptor that others write to when they have something to do."""
    wakers: tuple[int, ...]
    """Of each of the others: its ``woken``'s other end; of this one -1."""
    group: str
    """Name of the group."""
    port: int
    """Of the store through which process groups are made."""
    timeout: float
    """Seconds that one waits for another."""
    setup: tuple[str, ...] = ()
    """As of :attr:`reprise.parallel.messages.Start.setup`; for the engine's first rank."""

    def group_of(self, rank: int) -> Group:
        """The ranks of one number in all engines: they send each other rows."""
        return Group(f"{self.group}-{rank}", self.rank, self.size)

    def board_of(self, rank: int) -> Board:
        """What a rank and all ranks of all engines know of each other; to be made once."""
        number = self.rank * self.ranks + rank
        board = Board(self.everyone, number, self.size * self.ranks, 0)
        board.timeout, board.alike = self.timeout, False
        return board


class Joined(NamedTuple):
    """What a rank has of those of its number in other engines."""

    communicator: Communicator
    store: Any
    """Has to live as long."""


def join(
    seat: Seat,
    rank: int,
    board: Board,
    platform: Platform,
    config: EngineConfig,
    beside: Communicator | None,
) -> Joined:
    """Connect the ranks of one number; each of them calls it.

    Args:
        seat: Of the engine.
        rank: The number.
        board: As of :meth:`Seat.board_of`.
        platform: Of this rank.
        config: Of its engine; the others have the same.
        beside: Connects it with the ranks of its own engine; None: there are none.
    """
    store = TCPStore("127.0.0.1", seat.port, is_master=False)
    group = seat.group_of(rank)
    wanted = any(config.ops.get(op, NEED_IT) == NEED_IT for op in ROWS)
    direct = config.custom_all_reduce and wanted
    made = connect(
        group, platform.dist_backend, store, platform.device, seat.timeout, direct=direct
    )
    prove_direct(made, platform, board, config.ops, ROWS)
    both = [made] if beside is None else [made, beside]

    def told(calls: int) -> None:
        board.note_calls(sum(each.calls for each in both))

    for each in both:
        each.told = told
    return Joined(made, store)

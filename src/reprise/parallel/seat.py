"""Where an engine sits among others that share experts with it, and how its ranks join theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch._C._distributed_c10d import TCPStore

from reprise.config import EngineConfig
from reprise.distributed import Group
from reprise.distributed.board import Board
from reprise.distributed.communicator import Communicator, connect
from reprise.distributed.group import HERE
from reprise.distributed.meeting import Everyone, Meeting, SharedMeeting
from reprise.parallel.direct import NEED_IT, ROWS, prove_direct
from reprise.platforms import Platform


class Seat(Protocol):
    """What one rank of one of the engines has to know of the others."""

    @property
    def rank(self) -> int:
        """The engine's number among all."""

    @property
    def size(self) -> int:
        """Engines."""

    @property
    def ranks(self) -> int:
        """How many ranks each engine has."""

    @property
    def timeout(self) -> float:
        """Seconds that one waits for another."""

    @property
    def store(self) -> tuple[str, int]:
        """Address and port of the store through which process groups are made."""

    @property
    def setup(self) -> tuple[str, ...]:
        """As of :attr:`reprise.parallel.messages.Start.setup`; for the engine's first rank."""

    @property
    def inherited(self) -> tuple[int, ...]:
        """File descriptors that the engine's other ranks need."""

    def group_of(self, rank: int) -> Group:
        """The ranks of one number in all engines: they send each other rows."""

    def meeting(self) -> Meeting:
        """Where engines meet; for the first rank of each, and to be made once."""

    def everyone_of(self, rank: int) -> Everyone:
        """What a rank and all ranks of all engines know of each other; to be made once."""


@dataclass(frozen=True)
class SharedSeat:
    """Of an engine on the machine that all are on; plain data."""

    rank: int
    size: int
    ranks: int
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
    """Of the store."""
    timeout: float
    setup: tuple[str, ...] = ()

    @property
    def store(self) -> tuple[str, int]:
        return HERE.address, self.port

    @property
    def inherited(self) -> tuple[int, ...]:
        return (self.everyone,)

    def group_of(self, rank: int) -> Group:
        return Group(f"{self.group}-{rank}", self.rank, self.size)

    def meeting(self) -> Meeting:
        board = Board(self.memory, self.rank, self.size, 0)
        board.timeout = self.timeout
        return SharedMeeting(board, self.woken, self.wakers)

    def everyone_of(self, rank: int) -> Everyone:
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
    board: Everyone,
    platform: Platform,
    config: EngineConfig,
    beside: Communicator | None,
) -> Joined:
    """Connect the ranks of one number; each of them calls it.

    Args:
        seat: Of the engine.
        rank: The number.
        board: As of :meth:`Seat.everyone_of`.
        platform: Of this rank.
        config: Of its engine; the others have the same.
        beside: Connects it with the ranks of its own engine; None: there are none.
    """
    store = TCPStore(*seat.store, is_master=False)
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

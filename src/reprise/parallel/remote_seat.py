"""Where engines sit that share experts and are on several hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from reprise.distributed import Group, Host
from reprise.distributed.meeting import Everyone, Meeting
from reprise.distributed.peers import FirstPeer, OtherPeer
from reprise.errors import RanksError
from reprise.processes.sealed import Listener, Sealed, connect

CONNECT_SECONDS = 120.0
"""For the others to connect, all of which run."""


class RemoteTable(NamedTuple):
    """All engines and their ranks; plain data, of which the secret is not to be sent openly."""

    hosts: tuple[tuple[Host, ...], ...]
    """Of each engine's ranks."""
    place: tuple[str, int]
    """Where the first rank of the first engine listens."""
    secret: bytes
    """By which those who connect there show that they belong to the engines."""
    group: str
    """Name of the group."""
    port: int
    """Of the store, on that host."""
    timeout: float
    """Seconds that one waits for another."""


class RemoteSeat:
    """One rank's view of all engines. See :class:`reprise.parallel.Seat`.

    Args:
        table: All.
        engine: This one's number.
        listener: What others connect to, in the first rank of the first engine.
    """

    setup: tuple[str, ...] = ()
    inherited: tuple[int, ...] = ()

    def __init__(self, table: RemoteTable, engine: int, listener: Listener | None = None) -> None:
        self.rank, self.size = engine, len(table.hosts)
        self.ranks, self.timeout = len(table.hosts[0]), table.timeout
        self.store = table.place[0], table.port
        self._table, self._listener = table, listener
        self._made: list[FirstPeer | OtherPeer] = []
        self._everyone: FirstPeer | OtherPeer | None = None

    def group_of(self, rank: int) -> Group:
        hosts = tuple(each[rank] for each in self._table.hosts)
        return Group(f"{self._table.group}-{rank}", self.rank, self.size, hosts)

    def meeting(self) -> Meeting:
        return self._peer("engine", self.rank, self.size)

    def everyone_of(self, rank: int) -> Everyone:
        number = self.rank * self.ranks + rank
        self._everyone = self._peer("one of all", number, self.size * self.ranks)
        return self._everyone

    @property
    def first_failure(self) -> int | None:
        """The engine that failed first, or one of whose ranks has; None: nothing is known."""
        first = None if self._everyone is None else self._everyone.await_first_failure()
        return None if first is None else first // self.ranks

    def leave(self) -> None:
        """Others need not wait for this rank."""
        for each in self._made:
            each.end()

    def _peer(self, role: str, number: int, size: int) -> FirstPeer | OtherPeer:
        found: FirstPeer | OtherPeer
        if number == 0:
            assert self._listener is not None
            found = FirstPeer(_taken(self._listener.take, role, size), self.timeout)
        else:
            table = self._table
            ours = connect(table.place, f"{role} {number}", table.secret, CONNECT_SECONDS)
            found = OtherPeer(ours, number, size)
            found.timeout = self.timeout
        self._made.append(found)
        return found


def _taken(take: Callable[[str, float], Sealed], role: str, size: int) -> dict[int, Sealed]:
    try:
        return {number: take(f"{role} {number}", CONNECT_SECONDS) for number in range(1, size)}
    except TimeoutError as error:
        raise RanksError(str(error)) from error

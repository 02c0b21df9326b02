"""Followers that another program has started, on this host or others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from reprise.distributed import Host
from reprise.distributed.line import LeadersLine
from reprise.parallel.followers import WATCH_SECONDS, Followers
from reprise.processes.sealed import Sealed


class Rank(NamedTuple):
    """What is known of one before it has begun."""

    host: Host
    device: str
    """The device that the rank computes on, as its host calls it."""
    process: str
    """Which process, for people."""
    log: str
    """Where its log is, for people."""


class RemoteFollowers(Followers):
    """Followers that are connected. They end when their connections do; the program that has
    started them sees to it that nothing is left.

    Args:
        ranks: All of them, the leader's first.
        connections: Of each follower, by its rank.
        timeout: Seconds that a rank may take for one message.
    """

    def __init__(
        self, ranks: Sequence[Rank], connections: Mapping[int, Sealed], timeout: float
    ) -> None:
        self._line = LeadersLine(connections, timeout)
        super().__init__(self._line, timeout)
        self._ranks = ranks
        self.watch()

    def send(self, message: bytes) -> None:
        self._line.send(message)

    def fate(self, rank: int) -> str | None:
        return self._line.gone(rank)

    def called(self, rank: int) -> str:
        return self._ranks[rank].process

    def log(self, rank: int) -> str:
        return f"Its log: {self._ranks[rank].log}"

    def await_end(self, until: float) -> bool:
        while any(self.fate(rank) is None for rank in range(1, self.size)):
            if time.monotonic() > until:
                return False
            time.sleep(WATCH_SECONDS / 4)
        return True

    def kill(self) -> None:
        """Close the connections, without which the followers end."""
        self._line.end()


class Elsewhere(NamedTuple):
    """The ranks of an engine that another program has started."""

    ranks: tuple[Rank, ...]
    """All of them, the leader's first."""
    followers: Callable[[float], Followers]
    """Waits for the followers to connect, given the seconds that a rank may take."""

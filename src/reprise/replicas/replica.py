"""What a program has of each of its replicas, wherever that computes."""

from __future__ import annotations

import selectors
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum

from reprise.errors import RepriseError
from reprise.processes.channel import Channel
from reprise.progress import progress

POLL_SECONDS = 0.5
"""Between two looks at whether processes stand still."""


class Heard(Enum):
    """What a replica has said beside what its channel carries."""

    NOTHING = 0
    """Nothing that changes anything."""
    READY = 1
    """Its engine is loaded."""
    GONE = 2
    """It will say nothing more."""


class Replica(ABC):
    """One engine in a process of its own.

    Args:
        index: Among all.
        device: That it computes on, for people.
        log: Where its log is, for people.
    """

    def __init__(self, index: int, device: str, log: str) -> None:
        self.index, self.device, self.log = index, device, log

    @property
    def name(self) -> str:
        return f"replica {self.index}"

    @property
    @abstractmethod
    def control(self) -> socket.socket:
        """Readable when there is something to :meth:`hear`."""

    @abstractmethod
    def hear(self) -> Heard:
        """Read what it has said; called when there is something.

        Raises:
            RepriseError: It could not start: what it said.
        """

    @abstractmethod
    def channel(self, watch: Callable[[Channel], None]) -> Channel:
        """Connect to what answers there, once it is ready."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to end."""

    @abstractmethod
    def end(self, seconds: float) -> None:
        """Wait for its end, and end it if it takes longer."""

    @abstractmethod
    def kill(self) -> None:
        """End it now."""

    @abstractmethod
    def lost(self) -> str | None:
        """Why it has to be given up though it has not ended, if it has to; then it is ended. Asked
        every :data:`POLL_SECONDS`."""

    @abstractmethod
    def ended(self) -> str:
        """It says nothing more: make sure that it is gone, and say how it went."""

    @abstractmethod
    def forget(self) -> None:
        """This process was forked, and the replica is its parent's."""

    @abstractmethod
    def give_file(self, descriptor: int) -> None:
        """Hand it a file that a call is going to speak of.

        Raises:
            RequestError: It is on another host.
        """


class Fleet(ABC):
    """All replicas, started side by side."""

    replicas: Sequence[Replica]

    @abstractmethod
    def remove(self) -> None:
        """Remove what replicas that have ended well leave behind."""

    def ended(self, replica: Replica) -> str:
        """How a replica ended that says nothing more."""
        return replica.ended()

    def end(self) -> None:
        """Kill what is left of them."""
        for each in self.replicas:
            each.kill()


class Died(RepriseError):
    """A replica, before it was ready. Its log says why."""


def await_ready(fleet: Fleet) -> None:
    """Wait until every engine is ready.

    Raises:
        RepriseError: One could not start: what it said.
        Died: One said nothing.
    """
    replicas = fleet.replicas
    with selectors.DefaultSelector() as selector, progress("replicas", len(replicas)) as bar:
        for each in replicas:
            selector.register(each.control, selectors.EVENT_READ, each)
        while selector.get_map():
            for key, _ in selector.select(POLL_SECONDS):
                replica: Replica = key.data
                heard = replica.hear()
                if heard is Heard.READY:
                    selector.unregister(key.fileobj)
                    bar.advance()
                elif heard is Heard.GONE:
                    raise Died(f"{fleet.ended(replica)}. No replica was started")
            for replica in replicas:
                lost = replica.lost()
                if lost is not None:
                    raise Died(f"{lost}. No replica was started")

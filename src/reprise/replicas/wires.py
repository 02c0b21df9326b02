"""The channels of all replicas, read by one thread."""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from reprise.errors import RepriseError
from reprise.processes.channel import Channel
from reprise.processes.waker import Waker
from reprise.replicas.replica import POLL_SECONDS, Fleet, Heard, Replica

logger = logging.getLogger(__name__)

STOP_SECONDS = 9.0
"""For all replicas to free their devices and to end: more than an engine waits in its close, and
less than a server waits for the end of this process."""


class Wires:
    """Any thread sends, by :attr:`channels`; one reads, in :meth:`serve`, which also sends what
    sockets did not take at once.

    Args:
        fleet: Whose engines are ready.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker.receiver, selectors.EVENT_READ, None)
        self._lock = threading.Lock()
        self._to_watch: list[Channel] = []
        """Channels with something left to send."""
        self._deadline: float | None = None
        """For the end of replicas that were asked to end."""
        self.channels = [self._connect(each) for each in fleet.replicas]

    def _connect(self, replica: Replica) -> Channel:
        channel = replica.channel(self._watch)
        self._selector.register(channel.connection, selectors.EVENT_READ, (replica, channel))
        self._selector.register(replica.control, selectors.EVENT_READ, (replica, None))
        return channel

    def greetings(self) -> list[dict[str, Any]]:
        """What each replica says first: the facts of its engine.

        Raises:
            RepriseError: One has ended.
        """
        pairs = zip(self._fleet.replicas, self.channels, strict=True)
        return [self._greeting(replica, channel) for replica, channel in pairs]

    @staticmethod
    def _greeting(replica: Replica, channel: Channel) -> dict[str, Any]:
        while True:
            received = channel.connection.recv(1 << 16)
            if not received:
                raise RepriseError(f"{replica.ended()}. No replica was started")
            for message in channel.frames.feed(received):
                channel.connection.setblocking(False)
                facts: dict[str, Any] = message.facts
                return facts

    def serve(self, hear: Callable[[Any], None], flush: Callable[[], None]) -> str | None:
        """Read until :meth:`stop`, or until a replica is lost; then how it went.

        Args:
            hear: Called with each message.
            flush: Called when what had come is read.
        """
        replicas = self._fleet.replicas
        left = {each.index for each in replicas}
        while left:
            for key, events in self._selector.select(POLL_SECONDS):
                if key.data is None:
                    self._woken()
                    continue
                replica, channel = key.data
                if channel is not None and events & selectors.EVENT_WRITE:
                    channel.send_rest()
                    if not channel.blocked:
                        self._selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                if not events & selectors.EVENT_READ:
                    continue
                if channel is None:
                    over = replica.hear() is Heard.GONE
                else:
                    over = self._read(channel, hear)
                if over:
                    self._selector.unregister(key.fileobj)
                    if self._deadline is None:
                        flush()
                        return self._fleet.ended(replica)
                    if channel is not None:
                        left.discard(replica.index)
            flush()
            if self._deadline is None:
                for replica in replicas:
                    lost = replica.lost()
                    if lost is not None:
                        return lost
                continue
            for replica in replicas:
                if replica.index in left:
                    replica.lost()  # one that is stopped would not end: it is ended
            if time.monotonic() > self._deadline:
                logger.warning("replicas do not end within %.0f s: they are killed", STOP_SECONDS)
                return None
        assert self._deadline is not None
        for replica in replicas:
            replica.end(max(0.1, self._deadline - time.monotonic()))
        return None

    def stop(self) -> None:
        """Ask all replicas to end."""
        self._deadline = time.monotonic() + STOP_SECONDS
        for each in self._fleet.replicas:
            each.stop()
        self._waker.wake()

    def close(self) -> None:
        """No thread reads any more."""
        self._selector.close()

    def forked(self) -> None:
        """This process was forked, and the replicas are its parent's."""
        for replica in self._fleet.replicas:
            replica.forget()
        for channel in self.channels:
            channel.connection.close()

    def _watch(self, channel: Channel) -> None:
        with self._lock:
            self._to_watch.append(channel)
        self._waker.wake()

    def _woken(self) -> None:
        self._waker.clear()
        with self._lock:
            blocked, self._to_watch = self._to_watch, []
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[1] in blocked:
                self._selector.modify(key.fileobj, both, key.data)

    @staticmethod
    def _read(channel: Channel, hear: Callable[[Any], None]) -> bool:
        """Whether nothing more comes."""
        try:
            received = channel.connection.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            return True
        for message in channel.frames.feed(received):
            hear(message)
        return not received

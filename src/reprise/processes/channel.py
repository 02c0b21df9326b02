"""One side of a connection on which much is said."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from reprise.processes import wire


class Channel:
    """Sends without waiting: the engine's thread has steps to compute, a router other replicas.

    What the socket does not take at once is kept and sent by the thread that watches the socket.
    Meanwhile no request of this channel wants more: its news gather in the engine, as one delta,
    however long that takes.

    Args:
        connection: Non-blocking.
        watch: Called by any thread when the socket should be watched for room.
        frame: Makes a message into what is sent.
        frames: Make what comes into messages.
    """

    def __init__(
        self,
        connection: socket.socket,
        watch: Callable[[Channel], None],
        frame: Callable[[wire.Message], bytes] = wire.frame,
        frames: wire.Frames | None = None,
    ) -> None:
        self.connection = connection
        self.frames = wire.Frames() if frames is None else frames
        self.readers: dict[int, Any] = {}
        """Of unfinished requests, by number."""
        self._frame = frame
        self._watch = watch
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._gone = False
        self.items: list[Any] = []
        """Deltas of this step; for the engine's thread alone."""
        self.messages: list[wire.Message] = []
        """What is said before them, such as that requests were accepted; for that thread alone."""

    @property
    def blocked(self) -> bool:
        """The other side has not read what was sent."""
        return bool(self._unsent)

    def send(self, *messages: wire.Message) -> None:
        """Send messages in order, from any thread."""
        with self._lock:
            if self._gone:
                return
            data = b"".join(map(self._frame, messages))  # frames may be numbered
            if self._unsent:
                self._unsent += data
                return
            sent = self._try(data)
            if sent == len(data) or self._gone:
                return
            self._unsent += data[sent:]
        self._watch(self)

    def send_rest(self) -> None:
        """There is room again."""
        with self._lock:
            while self._unsent and not self._gone:
                sent = self._try(self._unsent[: 1 << 20])
                if not sent:
                    return
                del self._unsent[:sent]

    def flush(self) -> None:
        """Send what was kept, the deltas of a step in one frame: each time something is sent, the
        other side's process is woken, which may take longer than to make it."""
        messages, self.messages = self.messages, []
        if self.items:
            messages.append(wire.Deltas(self.items))
            self.items = []
        self.send(*messages)

    def close(self) -> None:
        """The other side is gone."""
        with self._lock:
            self._gone = True
            self._unsent.clear()
            self.connection.close()

    def _try(self, data: bytes | bytearray) -> int:
        try:
            return self.connection.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._gone = True  # its reader will see it too
            return 0


class OnChannel(Protocol):
    """A reader of the engine whose outputs a channel takes."""

    @property
    def channel(self) -> Channel: ...


def flush_all(readers: Iterable[OnChannel]) -> None:
    """Send all that is for a process at once."""
    for channel in {each.channel for each in readers}:
        if channel.items or channel.messages:
            channel.flush()

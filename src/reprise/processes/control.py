"""What parent and children say to each other, over a socket pair that ends with either."""

from __future__ import annotations

import socket
import threading

_LENGTH = 4


class Control:
    """One side of the pair. Any thread may send; one receives.

    Args:
        connection: A stream socket of the Unix family.
    """

    START = b"o"
    """To a child, with a text: what it is to do. The first word."""
    STOP = b"s"
    """To a child: finish what you have and end."""
    CONNECTION = b"c"
    """To a child, with a socket: serve the process at its other end."""
    FILE = b"m"
    """To a child, with a file that a later message speaks of."""
    READY = b"r"
    FAILED = b"f"
    """With a text: why the child could not start."""
    LOG = b"l"
    """With a text: a line of the child's log."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, word: bytes) -> None:
        with self._lock:
            self.connection.sendall(word)

    def send_text(self, word: bytes, text: str) -> None:
        data = text.encode()
        self.send(word + len(data).to_bytes(_LENGTH, "little") + data)

    def send_file(self, word: bytes, descriptor: int) -> None:
        """Hand a file or a socket to the other process; the caller closes his own."""
        with self._lock:
            socket.send_fds(self.connection, [word], [descriptor])

    def receive(self) -> tuple[bytes, int | None]:
        """The next word, and the descriptor that came with it, which belongs to the caller; no
        word: the other side is gone."""
        try:
            word, descriptors, _, _ = socket.recv_fds(self.connection, 1, 1)
        except OSError:
            return b"", None
        return word, descriptors[0] if descriptors else None

    def receive_text(self) -> str:
        """A text and the word before it, which was read or is read now and dropped."""
        self._exactly(1)
        return self.rest_of_text()

    def rest_of_text(self) -> str:
        """The text behind a word that was read."""
        length = int.from_bytes(self._exactly(_LENGTH), "little")
        return self._exactly(length).decode()

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.connection.recv(count - len(found))
            if not more:
                raise EOFError("the other process has ended")
            found += more
        return found

"""What parent and children say to each other, over a socket pair that ends with either."""

from __future__ import annotations

import socket

_LENGTH = 4


class Control:
    """One side of the pair.

    Args:
        connection: A stream socket of the Unix family.
    """

    STOP = b"s"
    """To a child: finish what you have and end."""
    READY = b"r"
    FAILED = b"f"
    _CONNECTION = b"c"

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def send(self, word: bytes) -> None:
        self.connection.sendall(word)

    def send_text(self, word: bytes, text: str) -> None:
        data = text.encode()
        self.connection.sendall(word + len(data).to_bytes(_LENGTH, "little") + data)

    def send_connection(self, connection: socket.socket) -> None:
        """Hand a socket to the other process; the caller closes his own."""
        socket.send_fds(self.connection, [self._CONNECTION], [connection.fileno()])

    def receive(self) -> tuple[bytes, socket.socket | None]:
        """The next word, and the socket that came with it; no word: the other side is gone."""
        try:
            word, descriptors, _, _ = socket.recv_fds(self.connection, 1, 1)
        except OSError:
            return b"", None
        if not descriptors:
            return word, None
        return word, socket.socket(fileno=descriptors[0])

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

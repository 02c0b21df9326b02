"""Wakes a thread that waits for sockets."""

from __future__ import annotations

import contextlib
import logging
import socket

logger = logging.getLogger(__name__)


class Waker:
    """A socket for the thread's selector, which any thread makes readable."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)

    def wake(self) -> None:
        """Let the thread go on."""
        try:
            self._sender.send(b"x")
        except BlockingIOError:
            pass  # it is awake
        except OSError:
            logger.debug("the process is ending")

    def clear(self) -> None:
        """What woke the thread is heard; it calls this before it looks for what there is to do."""
        with contextlib.suppress(BlockingIOError):
            self.receiver.recv(4096)

"""A replica's side, where the program is on another host."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable

from reprise.processes import wire
from reprise.processes.channel import Channel
from reprise.processes.sealed import Sealed
from reprise.replicas.service import ReplicaService


def sealed_channel(connection: Sealed, watch: Callable[[Channel], None]) -> Channel:
    """As of replicas on one host, but that no other process can speak on it: nothing is unpickled
    that the other side did not send."""

    def frame(message: wire.Message) -> bytes:
        body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        return wire.framed(connection.sending.close(body))

    frames = wire.Frames(lambda body: pickle.loads(connection.receiving.open(body)))
    return Channel(connection.connection, watch, frame, frames)


class ActorService(ReplicaService):
    """Computes what it is sent."""

    def serve(self, connection: Sealed) -> None:
        """Answer the driver."""
        self._connection = connection
        self.connect(connection.connection)

    def channel(self, connection: socket.socket) -> Channel:
        return sealed_channel(self._connection, self.watch)

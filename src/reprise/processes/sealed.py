"""Connections between hosts: only a process that knows the secret is listened to.

Both sides prove that they know it, each by a digest of what the other one drew. Then each frame has
a digest keyed by this connection, this direction and its number: what was forged, repeated, left
out or put in another place is not read. Frames are not encrypted: a reader of the network can read
prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import queue
import secrets
import socket
import struct
import threading
from typing import Any

from reprise.errors import RepriseError, describe
from reprise.processes.wire import framed

logger = logging.getLogger(__name__)

SECRET_BYTES = 32
_HELLO = b"reprise-1"
_NONCE_BYTES = 32
_DIGEST_BYTES = 16
_LENGTH = struct.Struct("<Q")
_MOST = 1 << 36
GREETING_SECONDS = 20.0
"""For the other side to prove itself. A connection that says nothing holds a thread for so long."""
MOST_GREETINGS = 64
"""Strangers at once; more are turned away."""
LONGEST_ROLE = 64
SILENCE_SECONDS = 15
"""A host that acknowledges nothing for so long is gone. It is the other host's system that
acknowledges, so a process may compute for longer."""


def new_secret() -> bytes:
    """A secret for the connections of one engine."""
    return secrets.token_bytes(SECRET_BYTES)


class Seal:
    """One direction of a connection."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def close(self, body: bytes) -> bytes:
        """A body with its digest."""
        return self._digest(body) + body

    def open(self, sealed: bytes) -> bytes:
        """The body of the next frame.

        Raises:
            RepriseError: It is not what the other side sent next.
        """
        body = sealed[_DIGEST_BYTES:]
        if not hmac.compare_digest(sealed[:_DIGEST_BYTES], self._digest(body)):
            raise RepriseError(
                f"frame {self._number} of a connection between hosts was forged or damaged, or one "
                "before it is missing: the connection ends"
            )
        return body

    def _digest(self, body: bytes) -> bytes:
        self._number += 1
        found = hashlib.blake2b(
            self._number.to_bytes(8, "little"), digest_size=_DIGEST_BYTES, key=self._key
        )
        found.update(body)
        return found.digest()


class Sealed:
    """A connection whose other side has proven itself. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket, sending: Seal, receiving: Seal) -> None:
        self.connection = connection
        self.sending, self.receiving = sending, receiving
        self._lock = threading.Lock()

    def send(self, body: bytes) -> None:
        """Raises an OSError when the other side is gone."""
        with self._lock:
            self.connection.sendall(framed(self.sending.close(body)))

    def receive(self) -> bytes:
        """The next body, when it has come.

        Raises:
            EOFError: The other side has ended.
            OSError: It cannot be reached any more.
            RepriseError: It did not send this.
        """
        (length,) = _LENGTH.unpack(_exactly(self.connection, _LENGTH.size))
        if not _DIGEST_BYTES <= length <= _MOST:
            raise RepriseError(f"a frame of {length} bytes: this is not the protocol")
        return self.receiving.open(_exactly(self.connection, length))

    def close(self) -> None:
        """End it, for the threads of both sides that wait for it as well."""
        with contextlib.suppress(OSError):  # it has ended
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Listener:
    """Takes connections in, in threads of its own.

    Args:
        address: Of this host, as others reach it.
        secret: That they know.

    Raises:
        RepriseError: This host does not have the address.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._secret = secret
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._socket = socket.create_server((address, 0), family=family)
        except OSError as error:
            raise RepriseError(
                f"this host cannot listen on {address}, by which others are to reach it ({error}): "
                "give the cluster's node an address that it has"
            ) from error
        self.place: tuple[str, int] = (address, self._socket.getsockname()[1])
        """Address and port."""
        self._came: dict[str, queue.SimpleQueue[Sealed]] = {}
        self._lock = threading.Lock()
        self._greetings = threading.BoundedSemaphore(MOST_GREETINGS)
        self._closed = False
        threading.Thread(target=self._accept, name="reprise-listener", daemon=True).start()

    def take(self, role: str, seconds: float) -> Sealed:
        """The connection of the process that has this role.

        Raises:
            TimeoutError: It has not come in time.
        """
        try:
            return self._of(role).get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"{role} has not connected within {seconds:.0f} s") from None

    def close(self) -> None:
        """Accept no connection any more."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _of(self, role: str) -> queue.SimpleQueue[Sealed]:
        with self._lock:
            return self._came.setdefault(role, queue.SimpleQueue())

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, peer = self._socket.accept()
            except OSError:
                return
            if not self._greetings.acquire(blocking=False):
                logger.warning("%s is turned away: too many have not said who they are", peer[0])
                connection.close()
                continue
            threading.Thread(
                target=self._greet, args=(connection, peer), name="reprise-greeting", daemon=True
            ).start()

    def _greet(self, connection: socket.socket, peer: Any) -> None:
        try:
            connection.settimeout(GREETING_SECONDS)
            found = _take_in(connection, self._secret)
            role = found.receive()
            if len(role) > LONGEST_ROLE:
                raise RepriseError("its role is too long")
            connection.settimeout(None)
            _prepare(connection)
        except (OSError, EOFError, RepriseError) as error:
            connection.close()
            if not self._closed:
                logger.warning("%s is not listened to: %s", peer[0], describe(error))
            return
        finally:
            self._greetings.release()
        self._of(role.decode(errors="replace")).put(found)


def connect(place: tuple[str, int], role: str, secret: bytes, seconds: float) -> Sealed:
    """Connect to a :class:`Listener`.

    Args:
        place: Its address and port.
        role: Ours.
        secret: That it knows.
        seconds: For it to answer.

    Raises:
        RepriseError: It cannot be reached, or does not know the secret.
    """
    connection: socket.socket | None = None
    try:
        connection = socket.create_connection(place, timeout=seconds)
        found = _introduce(connection, secret)
        found.send(role.encode())
        connection.settimeout(None)
        _prepare(connection)
    except (OSError, EOFError, RepriseError) as error:
        if connection is not None:
            connection.close()
        raise RepriseError(
            f"{place[0]}:{place[1]} does not answer {role} ({describe(error)}): the hosts have to "
            "reach each other on all ports"
        ) from error
    return found


def _introduce(connection: socket.socket, secret: bytes) -> Sealed:
    """Our side, which connects."""
    mine = os.urandom(_NONCE_BYTES)
    connection.sendall(_HELLO + mine)
    answer = _exactly(connection, _NONCE_BYTES + _DIGEST_BYTES)
    theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _keyed(secret, b"listens", mine, theirs)[:_DIGEST_BYTES]):
        raise RepriseError("the other side does not know the secret")
    connection.sendall(_keyed(secret, b"connects", mine, theirs)[:_DIGEST_BYTES])
    out, back = (_keyed(secret, way, mine, theirs) for way in (b"out", b"back"))
    return Sealed(connection, Seal(out), Seal(back))


def _take_in(connection: socket.socket, secret: bytes) -> Sealed:
    """The side that listens."""
    hello = _exactly(connection, len(_HELLO) + _NONCE_BYTES)
    if not hello.startswith(_HELLO):
        raise RepriseError("the other side does not speak this protocol")
    theirs, mine = hello[len(_HELLO) :], os.urandom(_NONCE_BYTES)
    connection.sendall(mine + _keyed(secret, b"listens", theirs, mine)[:_DIGEST_BYTES])
    proof = _exactly(connection, _DIGEST_BYTES)
    if not hmac.compare_digest(proof, _keyed(secret, b"connects", theirs, mine)[:_DIGEST_BYTES]):
        raise RepriseError("the other side does not know the secret")
    out, back = (_keyed(secret, way, theirs, mine) for way in (b"out", b"back"))
    return Sealed(connection, Seal(back), Seal(out))


def _keyed(secret: bytes, *parts: bytes) -> bytes:
    return hashlib.blake2b(b"|".join(parts), digest_size=32, key=secret).digest()


def _prepare(connection: socket.socket) -> None:
    """Send at once, and notice a host that is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = SILENCE_SECONDS // 3
    for name, value in (
        ("TCP_KEEPIDLE", third), ("TCP_KEEPALIVE", third), ("TCP_KEEPINTVL", third),
        ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000),
    ):  # fmt: skip
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        more = connection.recv(min(count - len(found), 1 << 20))
        if not more:
            raise EOFError("the other side has ended")
        found += more
    return bytes(found)

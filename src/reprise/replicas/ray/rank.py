"""One rank, in an actor of Ray: rank 0 with its engine, or a follower."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from torch._C._distributed_c10d import TCPStore

from reprise import platforms
from reprise.config import EngineConfig
from reprise.distributed import Host
from reprise.distributed.line import FollowersLine
from reprise.errors import RanksError, RepriseError, describe
from reprise.parallel.follower import follow
from reprise.parallel.followers import Followers
from reprise.parallel.remote import Elsewhere, Rank, RemoteFollowers
from reprise.parallel.remote_seat import RemoteSeat, RemoteTable
from reprise.processes.sealed import Listener, Sealed, connect
from reprise.replicas.ray.cluster import require_ray
from reprise.replicas.ray.service import ActorService

logger = logging.getLogger(__name__)

BEAT, READY, FAILED, STOP = b"b", b"r", b"f", b"s"
"""On the connection called ``control``, between driver and rank 0. Behind ``FAILED``: type and
message, in JSON."""
BEAT_SECONDS = 1.0
CONNECT_SECONDS = 120.0
"""For the others to connect, all of which run."""
LEAVE_SECONDS = 5.0
"""For a rank to notice by itself that there is no leader any more."""
LAST_WORDS_SECONDS = 0.5


class EngineEnded(RepriseError):
    """In an actor. The message says why."""

    engine: int | None = None
    """The first of those that share experts that failed; None: it is not known, or this one shares
    none."""


class RankProcess:
    """Runs where Ray has placed it, in a process of its own.

    Args:
        level: Of the log.
    """

    def __init__(self, level: int) -> None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        found = logging.getLogger("reprise")
        found.handlers, found.propagate = [handler], False
        found.setLevel(level)

    def place(self, device: str) -> Rank:
        """Where this actor is.

        Raises:
            PlatformError: The device is not on this host.
        """
        ray = require_ray()
        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        platform = platforms.resolve(device)
        return Rank(
            Host(context.get_node_id(), address),
            platform.device_of(0, 1),
            f"process {os.getpid()} on {address}",
            f"`ray logs actor --id {context.get_actor_id()}`",
        )

    def listen(self, secret: bytes) -> tuple[str, int]:
        """Accept connections that know the secret; of rank 0.

        Returns:
            Address and port, as all hosts of the cluster reach it.
        """
        self._listener = Listener(require_ray().util.get_node_ip_address(), secret)
        return self._listener.place

    def keep_store(self) -> int:
        """Be where engines that share experts find each other; of rank 0 of the first of them.

        Returns:
            Port of the store through which process groups are made.
        """
        address, _ = self._listener.place
        self._store: Any = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def lead(
        self,
        options: Mapping[str, Any],
        ranks: Sequence[Rank],
        table: RemoteTable | None = None,
        engine: int = 0,
    ) -> None:
        """Be rank 0 of an engine, until the driver says otherwise.

        Args:
            options: Of the engine.
            ranks: All of it, this one first.
            table: The engines that share experts; None: this one knows no other.
            engine: Its number among them.

        Raises:
            EngineEnded: The engine has ended.
        """
        control = self._listener.take("control", CONNECT_SECONDS)
        over = threading.Event()
        seat = None
        if table is not None:
            seat = RemoteSeat(table, engine, None if engine else self._listener)
        try:
            self._lead(control, over, options, ranks, seat)
        except RepriseError as error:
            ended = EngineEnded(str(error))
            ended.engine = None if seat is None else seat.first_failure
            raise ended from error
        finally:
            over.set()
            time.sleep(LAST_WORDS_SECONDS)  # for the driver to read what was said before
            if seat is not None:
                seat.leave()
            control.close()
            self._listener.close()

    def _lead(
        self,
        control: Sealed,
        over: threading.Event,
        options: Mapping[str, Any],
        ranks: Sequence[Rank],
        seat: RemoteSeat | None,
    ) -> None:
        serving: list[ActorService] = []

        def hear() -> None:
            """What the driver says; when it says nothing any more, it has died."""
            try:
                while control.receive() == STOP:
                    over.set()
                    for each in serving:
                        each.stop()
            except Exception:  # it ends in many ways, and all are its end
                if not over.is_set():
                    logger.warning("the driver is gone: rank 0 ends")
                    os._exit(1)

        threading.Thread(target=hear, name="reprise-control", daemon=True).start()
        threading.Thread(target=_beat, args=(control,), name="reprise-beat", daemon=True).start()
        try:
            elsewhere = Elsewhere(tuple(ranks), lambda timeout: self._followers(ranks, timeout))
            service = ActorService(EngineConfig(**options), elsewhere, seat)
        except Exception as error:
            typed = isinstance(error, RepriseError)
            if not typed:
                logger.exception("the engine could not start")
            told = (
                (type(error).__name__, str(error)) if typed else ("RepriseError", describe(error))
            )
            control.send(FAILED + json.dumps(told).encode())
            return
        control.send(READY)
        data = self._listener.take("data", CONNECT_SECONDS)
        try:
            service.serve(data)
            serving.append(service)
            if over.is_set():
                service.stop()
            service.run()
        finally:
            data.close()

    def _followers(self, ranks: Sequence[Rank], timeout: float) -> Followers:
        try:
            connections = {
                rank: self._listener.take(f"rank {rank}", CONNECT_SECONDS)
                for rank in range(1, len(ranks))
            }
        except TimeoutError as error:
            raise RanksError(str(error)) from error
        return RemoteFollowers(ranks, connections, timeout)

    def follow(
        self,
        place: tuple[str, int],
        secret: bytes,
        rank: int,
        size: int,
        table: RemoteTable | None = None,
        engine: int = 0,
    ) -> None:
        """Be a follower, until rank 0 says otherwise or is gone.

        Args:
            place: Of rank 0: see :meth:`listen`.
            secret: The engine's; a connection that does not know it is turned away.
            rank: Ours.
            size: Ranks there are.
            table: As of :meth:`lead`.
            engine: As of :meth:`lead`.
        """
        line = FollowersLine(connect(place, f"rank {rank}", secret, CONNECT_SECONDS), rank, size)
        line.on_end = _leave  # type: ignore[method-assign]
        seat = None if table is None else RemoteSeat(table, engine)
        try:
            follow(line, line, seat)
        except Exception as error:
            if not line.ended:
                if isinstance(error, RepriseError):
                    logger.error("%s: %s", type(error).__name__, error)
                else:
                    traceback.print_exc()
                line.fail(error)
        if seat is not None:
            seat.leave()
        line.close()


def _beat(control: Sealed) -> None:
    try:
        while True:
            control.send(BEAT)
            time.sleep(BEAT_SECONDS)
    except OSError:
        return  # it was closed


def _leave() -> None:
    """There is no leader any more. A collective may wait for it for ever."""
    time.sleep(LEAVE_SECONDS)
    os._exit(1)

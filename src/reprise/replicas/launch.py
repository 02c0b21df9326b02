"""Replicas as processes of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from reprise.config import EngineConfig
from reprise.errors import ConfigError, RepriseError, named
from reprise.parallel import SharedSeat
from reprise.processes.channel import Channel
from reprise.processes.child import STOPPED_SECONDS, Child
from reprise.processes.control import Control
from reprise.replicas.placement import Place, places
from reprise.replicas.replica import Died, Fleet, Heard, Replica, await_ready
from reprise.replicas.table import Table, descriptors

PROCESS = ("-m", "reprise.replicas.process")
MOST_CHARACTERS = 300
"""Of a last message."""
TAIL_BYTES = 4096
END_SECONDS = 5.0
"""For a process that says nothing more to end by itself, so that it is known how it did."""
SETTLE_SECONDS = 1.0
"""For another one to be found killed: its connections close, and a process that needs it may have
ended, before the system says that it is gone."""


class LocalReplica(Replica):
    """One process of this machine.

    Args:
        index: Among all.
        place: Its device.
        config: Of all.
        directory: For its log.
        command: Python's arguments for its process.
        seat: Among replicas that share experts; None: it knows no other.
    """

    def __init__(
        self,
        index: int,
        place: Place,
        config: EngineConfig,
        directory: Path,
        command: tuple[str, ...] = PROCESS,
        seat: SharedSeat | None = None,
    ) -> None:
        log = directory / f"replica-{index}.log"
        super().__init__(index, place.device, str(log))
        own = config.replace(data_parallel_size=1, device=place.device)
        start = {
            "engine": own.arguments(),
            "log": self.log,
            "level": logging.getLogger("reprise").getEffectiveLevel(),
            "seat": None if seat is None else dataclasses.asdict(seat),
        }
        try:
            text = json.dumps(start)
        except TypeError as error:
            raise ConfigError(
                f"options for replicas must be plain data, as JSON has it: {error}"
            ) from error
        with log.open("wb") as output:
            keep = () if seat is None else descriptors(seat)
            self._child = Child(self.name, command, text, keep, place.variables, output)

    @property
    def was_killed(self) -> bool:
        """A signal has ended it."""
        return self._child.was_killed

    @property
    def control(self) -> socket.socket:
        return self._child.control.connection

    def hear(self) -> Heard:
        word, _ = self._child.control.receive()
        if not word:
            return Heard.GONE
        if word == Control.READY:
            return Heard.READY
        text = self._child.control.rest_of_text()
        if word == Control.FAILED:
            kind, message = json.loads(text)
            raise named(kind, f"{self.name} ({self.device}): {message}")
        assert word == Control.LOG, word
        logger_name, level, message = json.loads(text)
        logging.getLogger(logger_name).log(level, "%s: %s", self.name, message)
        return Heard.NOTHING

    def channel(self, watch: Callable[[Channel], None]) -> Channel:
        ours, theirs = socket.socketpair()
        with theirs:
            self._child.control.send_file(Control.CONNECTION, theirs.fileno())
        return Channel(ours, watch)

    def stop(self) -> None:
        self._child.stop()

    def end(self, seconds: float) -> None:
        self._child.end(seconds)

    def kill(self) -> None:
        self._child.kill()

    def lost(self) -> str | None:
        if not self._child.stands_still:
            return None
        self._child.kill()
        return self._last_words(f"was stopped for {STOPPED_SECONDS:.0f} s (SIGSTOP), and ended")

    def ended(self) -> str:
        lost = self.lost()
        if lost is not None:
            return lost
        self._child.end(END_SECONDS)
        return self._last_words(f"was ended {self._child.fate}")

    def forget(self) -> None:
        self._child.control.connection.close()  # else it would not learn of the parent's end

    def give_file(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):  # it has died, which is noticed elsewhere
            self._child.control.send_file(Control.FILE, descriptor)

    def _last_words(self, what: str) -> str:
        """What is to be said of its end."""
        return (
            f"{self.name} ({self.device}, process {self._child.process.pid}) {what}; its last "
            f"message: {_last_line(Path(self.log))!r}; its log: {self.log}"
        )


class LocalFleet(Fleet):
    """All processes, and the directory of their logs.

    Args:
        config: Options of all.

    Raises:
        RepriseError: One could not start: what it said. No process is left.
    """

    def __init__(self, config: EngineConfig) -> None:
        chosen = places(config)
        self._directory = Path(tempfile.mkdtemp(prefix="reprise-replicas-"))
        self.replicas: list[LocalReplica] = []
        self._table: Table | None = None
        if config.enable_expert_parallel:
            self._table = Table(len(chosen), config.tensor_parallel_size)
        seats = [None] * len(chosen) if self._table is None else self._table.seats
        try:
            try:
                for index, (place, seat) in enumerate(zip(chosen, seats, strict=True)):
                    self.replicas.append(
                        LocalReplica(index, place, config, self._directory, seat=seat)
                    )
            finally:
                if self._table is not None:
                    self._table.taken()
            await_ready(self)
        except BaseException as error:
            self.end()
            if not isinstance(error, Died):  # its log says why
                self.remove()
            if isinstance(error, Died):
                raise RepriseError(str(error)) from None
            raise

    def ended(self, replica: Replica) -> str:
        """How a replica ended; where replicas share experts another one may be the reason."""
        if self._table is None:
            return replica.ended()
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            killed = [each for each in self.replicas if each.was_killed]
            first = self._table.first_failure
            if killed:
                return killed[0].ended()
            if first is not None:
                number, why = first
                return f"{self.replicas[number].ended()}; why: {why}"
            if time.monotonic() > until:
                return replica.ended()
            time.sleep(0.01)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            shutil.rmtree(self._directory)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [each.strip() for each in lines if each.strip()]
    return said[-1][:MOST_CHARACTERS] if said else ""

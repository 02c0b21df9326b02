"""Starts replicas, and says how one of them ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import shutil
import socket
import tempfile
from pathlib import Path
from typing import NamedTuple

from reprise.config import EngineConfig
from reprise.errors import ConfigError, RepriseError, named
from reprise.parallel import Seat
from reprise.processes.child import STOPPED_SECONDS, Child
from reprise.processes.control import Control
from reprise.progress import progress
from reprise.replicas.placement import Place, places
from reprise.replicas.table import Table, descriptors

logger = logging.getLogger(__name__)

PROCESS = ("-m", "reprise.replicas.process")
POLL_SECONDS = 0.5
"""Between two looks at whether processes stand still."""
MOST_CHARACTERS = 300
"""Of a last message."""
TAIL_BYTES = 4096


class Replica:
    """One process.

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
        seat: Seat | None = None,
    ) -> None:
        self.index = index
        self.device = place.device
        self.log = directory / f"replica-{index}.log"
        own = config.replace(data_parallel_size=1, device=place.device)
        start = {
            "engine": own.arguments(),
            "log": str(self.log),
            "level": logging.getLogger("reprise").getEffectiveLevel(),
            "seat": None if seat is None else dataclasses.asdict(seat),
        }
        try:
            text = json.dumps(start)
        except TypeError as error:
            raise ConfigError(
                f"options for replicas must be plain data, as JSON has it: {error}"
            ) from error
        with self.log.open("wb") as output:
            keep = () if seat is None else descriptors(seat)
            self.child = Child(self.name, command, text, keep, place.variables, output)

    @property
    def name(self) -> str:
        return f"replica {self.index}"

    def heard(self, word: bytes) -> None:
        """Show a line of its log in ours."""
        assert word == Control.LOG, word
        logger_name, level, message = json.loads(self.child.control.rest_of_text())
        logging.getLogger(logger_name).log(level, "%s: %s", self.name, message)

    def connect(self) -> socket.socket:
        """Our end of a connection to what answers there."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.child.control.send_file(Control.CONNECTION, theirs.fileno())
        return ours

    def last_words(self, what: str) -> str:
        """What is to be said of its end."""
        return (
            f"{self.name} ({self.device}, process {self.child.process.pid}) {what}; its last "
            f"message: {_last_line(self.log)!r}; its log: {self.log}"
        )

    def ended(self) -> str:
        """It has said nothing more: make sure that it is gone, and say how it went."""
        if self.child.stands_still:
            return self.stopped()
        self.child.end(POLL_SECONDS)
        return self.last_words(f"was ended {self.child.fate}")

    def stopped(self) -> str:
        """It stands still: end it."""
        self.child.kill()
        return self.last_words(f"was stopped for {STOPPED_SECONDS:.0f} s (SIGSTOP), and ended")


class Launched(NamedTuple):
    """Replicas that are ready."""

    replicas: list[Replica]
    directory: Path
    """Of their logs."""
    table: Table | None
    """At which they sit, if they share experts."""

    def lost(self, replica: Replica) -> str:
        """How it went when a replica has said nothing more: of those that share experts another one
        may be the reason."""
        if self.table is None:
            return replica.ended()
        killed = [each for each in self.replicas if each.child.was_killed]
        first = self.table.first_failure
        if killed:
            replica = killed[0]
        elif first is not None:
            replica = self.replicas[first]
        return replica.ended()


def launch(config: EngineConfig) -> Launched:
    """Start all replicas side by side, and wait until every engine is ready.

    Raises:
        RepriseError: One could not start: what it said. No process is left.
    """
    chosen = places(config)
    directory = Path(tempfile.mkdtemp(prefix="reprise-replicas-"))
    replicas: list[Replica] = []
    table = Table(len(chosen)) if config.enable_expert_parallel else None
    seats = [None] * len(chosen) if table is None else table.seats
    launched = Launched(replicas, directory, table)
    try:
        for index, (place, seat) in enumerate(zip(chosen, seats, strict=True)):
            replicas.append(Replica(index, place, config, directory, seat=seat))
        if table is not None:
            table.taken()
        _await(launched)
    except BaseException as error:
        end_all(replicas)
        if not isinstance(error, _Died):  # its log says why
            remove(directory)
        if isinstance(error, _Died):
            raise RepriseError(str(error)) from None
        raise
    return launched


class _Died(RepriseError):
    """Before it was ready."""


def _await(launched: Launched) -> None:
    replicas = launched.replicas
    with selectors.DefaultSelector() as selector, progress("replicas", len(replicas)) as bar:
        for each in replicas:
            selector.register(each.child.control.connection, selectors.EVENT_READ, each)
        while selector.get_map():
            for key, _ in selector.select(POLL_SECONDS):
                replica: Replica = key.data
                word, _ = replica.child.control.receive()
                if word == Control.READY:
                    selector.unregister(key.fileobj)
                    bar.advance()
                elif word == Control.FAILED:
                    kind, message = json.loads(replica.child.control.rest_of_text())
                    raise named(kind, f"{replica.name} ({replica.device}): {message}")
                elif not word:
                    raise _Died(f"{launched.lost(replica)}. No replica was started")
                else:
                    replica.heard(word)
            for replica in replicas:
                if replica.child.stands_still:
                    raise _Died(f"{replica.stopped()}. No replica was started")


def end_all(replicas: list[Replica]) -> None:
    """Kill what is left of them."""
    for each in replicas:
        each.child.kill()


def remove(directory: Path) -> None:
    """Of replicas that have ended well nothing stays."""
    with contextlib.suppress(OSError):
        shutil.rmtree(directory)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said = [each.strip() for each in lines if each.strip()]
    return said[-1][:MOST_CHARACTERS] if said else ""

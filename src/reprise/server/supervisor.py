"""The process that the user starts: it holds the port, and starts, watches and ends the others.

One child has the engine, the others speak HTTP. Each has a socket pair with this process, whose end
tells either side at once that the other one is gone, however it died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import selectors
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from reprise.config import EngineConfig
from reprise.errors import ConfigError, RepriseError, named
from reprise.processes.child import Child
from reprise.processes.control import Control
from reprise.server.options import ServerOptions

logger = logging.getLogger(__name__)

ENGINE = ("-m", "reprise.server.engine_process")
WORKER = ("-m", "reprise.server.worker")
STOP_SECONDS = 10.0
"""For the engine's process to free its device; for HTTP processes to tell their callers that the
engine has died."""
QUICK_SECONDS = 5.0
MOST_QUICK_DEATHS = 3
"""Deaths of HTTP processes in a row, each so soon behind its start, that are not a coincidence."""


class Supervisor:
    """Runs a server until it is told to stop.

    Args:
        engine: Options of the engine.
        options: Of the server.
        log_level: Of all processes.
        engine_command: Python's arguments for the engine's process.
        announce: Called with the server's address when the model is loaded and every HTTP process
            knows it.

    Raises:
        ConfigError: The address cannot be listened on.
    """

    def __init__(
        self,
        engine: EngineConfig,
        options: ServerOptions,
        log_level: str = "info",
        engine_command: Sequence[str] = ENGINE,
        announce: Any = None,
    ) -> None:
        self._engine_options = engine
        self._options = options
        self._level = log_level
        self._engine_command = engine_command
        self._announce = announce
        options.template  # noqa: B018 - a file that is not there is told now
        _raise_file_limit()
        self.listener = _listen(options)
        self._signals: list[int] = []
        self._workers: list[Child] = []
        self._awaited: set[Child] = set()
        """HTTP processes that have not said yet that they know the engine."""
        self._selector = selectors.DefaultSelector()
        self._engine: Child | None = None
        self._quick_deaths = 0
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._variables: dict[str, str] = {}
        if options.api_server_count > 1:
            # Each scrape meets another process: their counts are added up in files.
            self._directory = tempfile.TemporaryDirectory(prefix="reprise-metrics-")
            self._variables["PROMETHEUS_MULTIPROC_DIR"] = self._directory.name

    @property
    def address(self) -> str:
        """Where clients find it."""
        if self._options.uds is not None:
            return f"unix:{self._options.uds}"
        host, port = self.listener.getsockname()[:2]
        scheme = "http" if self._options.ssl_certfile is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then running requests end, and so does this.

        Raises:
            RepriseError: The engine could not start or has died, or HTTP processes keep dying.
        """
        before = {
            each: signal.signal(each, self._signalled) for each in (signal.SIGTERM, signal.SIGINT)
        }
        # Wakes the selector, whichever moment a signal comes at.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        receiver.setblocking(False)
        wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            self._start()
            self._watch(receiver)
        finally:
            self._selector.close()
            self._kill_all()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            self.listener.close()
            if self._directory is not None:
                self._directory.cleanup()
            if self._options.uds is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._options.uds)
            receiver.close()
            sender.close()

    def _start(self) -> None:
        start = {
            "engine": self._engine_options.arguments(),
            "limits": [
                self._options.max_num_queued_reqs,
                self._options.max_num_queued_tokens,
                self._options.response_store_bytes,
            ],
            "log_level": self._level,
            "log_format": self._options.log_format,
        }
        self._engine = Child("the engine's process", self._engine_command, json.dumps(start))
        for _ in range(self._options.api_server_count):
            self._start_worker()

    def _start_worker(self) -> None:
        assert self._engine is not None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with contextlib.suppress(OSError):  # if the engine has died, that is noticed
                self._engine.control.send_file(Control.CONNECTION, ours.fileno())
            keep = (self.listener.fileno(), theirs.fileno())
            start = {
                "options": self._options.to_json(),
                "listener": keep[0],
                "engine": keep[1],
                "log_level": self._level,
            }
            child = Child("an HTTP process", WORKER, json.dumps(start), keep, self._variables)
            self._workers.append(child)
            self._awaited.add(child)
            self._selector.register(child.control.connection, selectors.EVENT_READ, child)

    def _hear(self, worker: Child) -> None:
        """It is ready, or lost: then it will be replaced."""
        self._selector.unregister(worker.control.connection)
        word, _ = worker.control.receive()
        if word == Control.READY:
            self._awaited.remove(worker)

    def _watch(self, wakeup: socket.socket) -> None:
        engine = self._engine
        assert engine is not None
        ready = announced = False
        selector = self._selector
        selector.register(wakeup, selectors.EVENT_READ)
        selector.register(engine.control.connection, selectors.EVENT_READ)
        while not self._signals:
            for key, _ in selector.select(0.2):
                if key.fileobj is wakeup:
                    with contextlib.suppress(BlockingIOError):
                        wakeup.recv(4096)
                elif key.data is not None:
                    self._hear(key.data)
                else:
                    word, _ = engine.control.receive()
                    if word == Control.READY:
                        ready = True
                    elif word == Control.FAILED:
                        raise named(*json.loads(engine.control.rest_of_text()))
                    else:
                        self._engine_died(engine, ready)
            if engine.stands_still:
                engine.kill()
                self._engine_died(engine, ready)
            self._replace_workers()
            if ready and not announced and not self._awaited:
                announced = True
                if self._announce is not None:
                    self._announce(self.address)
        if ready:
            self._drain(engine)
        else:
            logger.info("stopping: the model is not loaded yet, so that nobody is waited for")

    def _engine_died(self, engine: Child, ready: bool) -> None:
        engine.end(STOP_SECONDS)
        if ready:
            self._let_callers_be_told()
        raise RepriseError(
            f"the engine's process ended {engine.fate}; its log lines above say why. "
            "Start the server again"
        )

    def _replace_workers(self) -> None:
        for each in list(self._workers):
            if each.stands_still:  # its callers wait for it: a broken connection tells them
                logger.warning("an HTTP process stands still (SIGSTOP): it is killed")
                each.process.kill()
                each.process.wait()
            if each.process.poll() is None:
                continue
            # Before it is closed: a selector does not know what is.
            if each.control.connection in self._selector.get_map():
                self._selector.unregister(each.control.connection)
            self._awaited.discard(each)
            each.end(0)
            self._workers.remove(each)
            quick = time.monotonic() - each.started < QUICK_SECONDS
            self._quick_deaths = self._quick_deaths + 1 if quick else 0
            if self._quick_deaths >= MOST_QUICK_DEATHS:
                raise RepriseError(
                    f"HTTP processes end {each.fate} as soon as they are started; their log lines "
                    "above say why"
                )
            logger.warning("an HTTP process ended %s: another one takes its place", each.fate)
            self._start_worker()

    def _drain(self, engine: Child) -> None:
        """New requests are refused, running ones end, within their time."""
        limit = self._options.shutdown_timeout
        logger.info("stopping: running requests get %.0f s; again to stop at once", limit)
        for each in self._workers:
            each.stop()
        end = time.monotonic() + limit + STOP_SECONDS
        while any(each.process.poll() is None for each in self._workers):
            if len(self._signals) > 1 or time.monotonic() > end:
                logger.warning("stopped at once: running requests are lost")
                return
            for each in (engine, *self._workers):
                if each.stands_still:
                    each.kill()
            if engine.process.poll() is not None:
                self._let_callers_be_told()
                return
            time.sleep(0.02)
        engine.stop()
        engine.end(STOP_SECONDS)

    def _let_callers_be_told(self) -> None:
        """The engine has died, as HTTP processes see. They end when they have told it."""
        for each in self._workers:
            each.stop()
        end = time.monotonic() + STOP_SECONDS
        while any(each.process.poll() is None for each in self._workers):
            if len(self._signals) > 1 or time.monotonic() > end:
                return
            for each in self._workers:
                if each.stands_still:
                    each.kill()
            time.sleep(0.02)

    def _kill_all(self) -> None:
        for each in (*self._workers, *([self._engine] if self._engine else [])):
            if each.process.poll() is None:
                each.process.kill()
            each.end(STOP_SECONDS)

    def _signalled(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)


def _listen(options: ServerOptions) -> socket.socket:
    if options.uds is not None:
        return _listen_at_path(options.uds)
    try:
        return socket.create_server(
            (options.host, options.port),
            family=socket.AF_INET6 if ":" in options.host else socket.AF_INET,
            backlog=2048,
        )
    except OSError as error:
        raise ConfigError(
            f"host={options.host!r}, port={options.port}: {error.strerror or error}; give another"
        ) from error


def _listen_at_path(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise ConfigError(f"uds={path!r}: another server listens there")
            os.unlink(path)  # left by one that was killed
        listener.bind(path)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"uds={path!r}: {error.strerror or error}") from error
    return listener


def _raise_file_limit() -> None:
    """Each connection is a file: take as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

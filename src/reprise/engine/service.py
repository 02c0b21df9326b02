"""Answers other processes about what a driver computes: requests, and questions beside."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any

from reprise.engine.driver import Driver
from reprise.errors import RepriseError
from reprise.processes import wire
from reprise.processes.channel import Channel
from reprise.processes.waker import Waker

logger = logging.getLogger(__name__)


class EngineService(ABC):
    """Reads what other processes send, and answers.

    Args:
        driver: Computes.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.channels: list[Channel] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._new: list[socket.socket] = []
        self._to_watch: list[Channel] = []
        self._waker = Waker()
        self._selector.register(self._waker.receiver, selectors.EVENT_READ, None)
        self._stopping = False

    @abstractmethod
    def hello(self) -> wire.Hello:
        """What a process is told first."""

    @abstractmethod
    def channel(self, connection: socket.socket) -> Channel:
        """The way to speak with a process, which calls :meth:`watch`."""

    @abstractmethod
    def generate(self, channel: Channel, requests: list[wire.Generate]) -> None:
        """Have requests computed that came together. Raises nothing: a client that is refused is
        told."""

    @abstractmethod
    def call(self, call: wire.Call) -> Future[Any]:
        """The answer.

        Raises:
            RepriseError: There is none.
        """

    def take_file(self, descriptor: int) -> None:
        """A file that a call is going to speak of. It comes from the parent, so in any thread."""
        os.close(descriptor)

    # ---- any thread ------------------------------------------------------------------------

    def connect(self, connection: socket.socket) -> None:
        """Serve a process."""
        with self._lock:
            self._new.append(connection)
        self._waker.wake()

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stopping = True
        self._waker.wake()

    def watch(self, channel: Channel) -> None:
        """Tell when there is room to send again."""
        with self._lock:
            self._to_watch.append(channel)
        self._waker.wake()

    # ---- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`, or until the driver has ended.

        Raises:
            RepriseError: It has.
        """
        threading.Thread(target=self._await_end, name="reprise-watch", daemon=True).start()
        while not self._stopping and self.driver.closed is None:
            for key, events in self._selector.select():
                channel = key.data
                if channel is None:
                    self._woken()
                    continue
                if events & selectors.EVENT_WRITE:
                    channel.send_rest()
                    if not channel.blocked:
                        self._selector.modify(channel.connection, selectors.EVENT_READ, channel)
                if events & selectors.EVENT_READ:
                    self._read(channel)
        if not self._stopping:
            raise RepriseError(self.driver.closed)
        self.driver.shutdown()

    def _await_end(self) -> None:
        self.driver.join()
        self._waker.wake()

    def _woken(self) -> None:
        self._waker.clear()
        with self._lock:
            new, self._new = self._new, []
            blocked, self._to_watch = self._to_watch, []
        for connection in new:
            connection.setblocking(False)
            channel = self.channel(connection)
            self.channels.append(channel)
            self._selector.register(connection, selectors.EVENT_READ, channel)
            channel.send(self.hello())
        for channel in blocked:
            if channel in self.channels:
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self._selector.modify(channel.connection, both, channel)

    def _read(self, channel: Channel) -> None:
        try:
            received = channel.connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop(channel)
            return
        requests: list[wire.Generate] = []
        for message in channel.frames.feed(received):
            if isinstance(message, wire.Generate):
                requests.append(message)
                continue
            if requests:
                self.generate(channel, requests)
                requests = []
            if isinstance(message, list):
                self.generate(channel, message)
            elif isinstance(message, wire.Leave):
                reader = channel.readers.pop(message.number, None)
                if reader is not None:
                    self.driver.leave(reader.name, reader)
            else:
                self._call(channel, message)
        if requests:
            self.generate(channel, requests)

    def _drop(self, channel: Channel) -> None:
        """A process is gone, and with it all its callers."""
        self._selector.unregister(channel.connection)
        self.channels.remove(channel)
        channel.close()
        readers = list(channel.readers.values())
        channel.readers.clear()
        for each in readers:
            self.driver.leave(each.name, each)
        if readers:
            logger.warning("a process is gone: its %d request(s) are aborted", len(readers))

    def refuse(self, channel: Channel, number: int, error: BaseException) -> None:
        """Tell that a request or call has failed."""
        channel.readers.pop(number, None)
        channel.send(wire.Refused(number, type(error).__name__, str(error)))

    def _call(self, channel: Channel, call: wire.Call) -> None:
        try:
            answer = self.call(call)
        except RepriseError as error:
            self.refuse(channel, call.number, error)
            return

        def reply(done: Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                self.refuse(channel, call.number, error)
            else:
                channel.send(wire.Reply(call.number, done.result()))

        answer.add_done_callback(reply)

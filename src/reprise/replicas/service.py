"""A replica's side: an engine's thread, and one channel to the program that started it."""

from __future__ import annotations

import queue
import socket
from concurrent.futures import Future
from typing import Any

from reprise.config import EngineConfig
from reprise.engine import CompletionGroup, EngineThread
from reprise.engine.driver import then
from reprise.engine.service import EngineService
from reprise.engine.thread import Submission
from reprise.errors import FailedRequestError, RepriseError, StepError, describe
from reprise.outputs import RequestMetrics, RequestOutput
from reprise.parallel import Elsewhere, Seat
from reprise.processes import wire
from reprise.processes.channel import Channel, flush_all
from reprise.replicas.deltas import pack
from reprise.replicas.weights import read_weights
from reprise.sampling_params import RequestOutputKind

FILE_SECONDS = 60
"""For a file to come, which was sent before the call that speaks of it."""


class ReplicaService(EngineService):
    """Computes what it is sent.

    Args:
        config: Of one engine.
        elsewhere: As of :class:`reprise.engine.Engine`.
        seat: As of :class:`reprise.engine.Engine`.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(
        self, config: EngineConfig, elsewhere: Elsewhere | None = None, seat: Seat | None = None
    ) -> None:
        self.thread = EngineThread(config, flush_all, elsewhere, seat)
        super().__init__(self.thread)
        self._files: queue.SimpleQueue[int] = queue.SimpleQueue()

    def hello(self) -> wire.Hello:
        engine = self.thread.engine
        return wire.Hello(
            0,
            {
                "config": engine.config,
                "vocab_size": engine.vocab_size,
                "max_model_len": engine.max_model_len,
                "capacity": engine.scheduler.cache.capacity,
                "device": engine.devices[0],
                "block_size": engine.runner.block_size,
                "num_blocks": engine.stats().scheduler.num_blocks,
                "startup_seconds": engine.startup_seconds,
            },
        )

    def channel(self, connection: socket.socket) -> Channel:
        return Channel(connection, self.watch)

    def generate(self, channel: Channel, requests: list[wire.Generate]) -> None:
        found = []
        try:
            for each in requests:
                reader = ReplicaReader(channel, each.number, each.name, "whole" in each.wants)
                channel.readers[each.number] = reader
                if each.params.params.structured_outputs is None:
                    found.append(
                        Submission(
                            each.name, each.prompt, each.params, each.priority, each.ordinal, reader
                        )
                    )
                else:
                    self._generate_structured(channel, each, reader)
            self.thread.submit_all(found)
        except RepriseError as error:
            for one in requests:
                self.refuse(channel, one.number, error)

    def _generate_structured(
        self, channel: Channel, request: wire.Generate, reader: ReplicaReader
    ) -> None:
        """Its grammar is compiled here, where no request waits for it."""
        accepted = self.thread.submit(
            request.name,
            lambda: request.prompt,
            request.params.params,
            request.priority,
            reader,
            ordinal=request.ordinal,
        )

        def refuse(done: Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is not None:
                self.refuse(channel, request.number, error)

        accepted.add_done_callback(refuse)

    def take_file(self, descriptor: int) -> None:
        self._files.put(descriptor)

    def call(self, call: wire.Call) -> Future[Any]:
        if call.what == "abort":
            return self._abort(call.arguments["number"])
        arguments = call.arguments["arguments"]
        if call.what == "update_weights":
            # Here, where no request waits for tokens: the engine's thread gets tensors.
            arguments = [read_weights(self._files.get(timeout=FILE_SECONDS), *arguments)]
        return then(self.thread.ask(call.what, *arguments), lambda found: found[0])

    def _abort(self, number: int) -> Future[Any]:
        names = [
            reader.name
            for channel in self.channels
            for reader in [channel.readers.get(number)]
            if reader is not None
        ]
        if names:
            return self.thread.abort(names[0])
        return self.thread.call(lambda: None)  # it has ended

    def refuse(self, channel: Channel, number: int, error: BaseException) -> None:
        channel.readers.pop(number, None)
        channel.send(refusal(number, error))


class ReplicaReader:
    """Puts what is new of one request on the channel.

    Args:
        channel: To the program.
        number: Of the request, there.
        name: Of the request, here.
        whole: It wants all at once, whatever its parameters say.
    """

    texts = None

    def __init__(self, channel: Channel, number: int, name: str, whole: bool) -> None:
        self.channel = channel
        self.name = name
        self._number = number
        self._group: CompletionGroup | None = None
        self._final_only = whole
        self._metrics: RequestMetrics | None = None

    def accepted(self, group: CompletionGroup) -> None:
        self._group = group
        self._final_only |= group.params.output_kind is RequestOutputKind.FINAL_ONLY
        self.channel.items.append((self._number,))

    @property
    def wants_more(self) -> bool:
        return not self._final_only and not self.channel.blocked

    def put(self, delta: RequestOutput) -> None:
        if delta.finished:
            self.channel.readers.pop(self._number, None)
        self.channel.items.append((self._number, *self._packed(delta)))

    def fail(self, error: Exception) -> None:
        self.channel.readers.pop(self._number, None)
        output = None
        if self._group is not None and isinstance(error, FailedRequestError):
            output = self._packed(self._group.delta())
        self.channel.send(refusal(self._number, error)._replace(output=output))

    def _packed(self, delta: RequestOutput) -> tuple[Any, ...]:
        news = None if delta.metrics is self._metrics else delta.metrics
        self._metrics = delta.metrics
        return pack(delta, news)


def refusal(number: int, error: BaseException) -> wire.Refused:
    """An error, by a name that the other side knows."""
    if isinstance(error, RepriseError):
        return wire.Refused(number, type(error).__name__, str(error))
    return wire.Refused(number, StepError.__name__, describe(error))

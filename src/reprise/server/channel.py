"""The engine's side of the connection to one HTTP process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from reprise.engine import CompletionGroup
from reprise.outputs import CompletionOutput, Logprobs, RequestOutput
from reprise.server import wire
from reprise.server.facts import Emissions
from reprise.server.token_bytes import TokenBytes

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for, as in the OpenAI API and vLLM."""
TAIL_CHARACTERS = 64


class Channel:
    """Sends without waiting: the engine's thread has steps to compute.

    What the socket does not take at once is kept and sent by whoever watches the socket.
    Meanwhile no request of this channel wants more: its news gather in the engine, as one delta,
    however long that takes.

    Args:
        connection: Non-blocking.
        emissions: Counts what is sent.
        watch: Called by any thread when the socket should be watched for room.
    """

    def __init__(
        self,
        connection: socket.socket,
        emissions: Emissions,
        watch: Callable[[Channel], None],
    ) -> None:
        self.connection = connection
        self.frames = wire.Frames()
        self.readers: dict[int, WireReader] = {}
        """Of unfinished requests, by number."""
        self._watch = watch
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._gone = False
        self.emissions = emissions
        self.items: list[list[Any]] = []
        """Deltas of this step; for the engine's thread alone."""

    @property
    def blocked(self) -> bool:
        """The other side has not read what was sent."""
        return bool(self._unsent)

    def send(self, message: wire.Message) -> None:
        """From any thread, in order."""
        data = wire.frame(message)
        with self._lock:
            if self._gone:
                return
            if self._unsent:
                self._unsent += data
                return
            sent = self._try(data)
            if sent == len(data) or self._gone:
                return
            self._unsent += data[sent:]
        self._watch(self)

    def send_rest(self) -> None:
        """There is room again."""
        with self._lock:
            while self._unsent and not self._gone:
                sent = self._try(self._unsent[: 1 << 20])
                if not sent:
                    return
                del self._unsent[:sent]

    def flush(self) -> None:
        """Send the deltas of a step in one frame."""
        items, self.items = self.items, []
        self.send(wire.Deltas(items))

    def close(self) -> None:
        """The other side is gone."""
        with self._lock:
            self._gone = True
            self._unsent.clear()
            self.connection.close()

    def _try(self, data: bytes | bytearray) -> int:
        try:
            return self.connection.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._gone = True  # whoever reads from it will see it too
            return 0


class WireReader:
    """Puts what is new of one request on the channel of its HTTP process."""

    def __init__(
        self, channel: Channel, request: wire.Generate, name: str, texts: TokenBytes
    ) -> None:
        self.channel = channel
        self.number = request.number
        self.name = name
        """The engine's."""
        self.called = request.name
        """The caller's."""
        self.chat = request.chat is not None
        self._wants = frozenset(request.wants)
        self._ids = "ids" in self._wants
        self._final_only = request.params.get("output_kind") == "FINAL_ONLY"
        self._texts = texts
        self._last_put: float | None = None

    def accepted(self, group: CompletionGroup) -> None:
        facts: dict[str, Any] = {}
        ids = group.completions[0].request.prompt_token_ids
        facts["prompt_tokens"] = len(ids)
        if "prompt" in self._wants:
            whole = group.prompt is not None and group.params.truncate_prompt_tokens is None
            facts["prompt"] = group.prompt if whole else self._texts.text(ids)
            facts["first"] = [ids[0], self._texts.text(ids[:1])]
        if "prompt_ids" in self._wants:
            facts["prompt_ids"] = ids
        if "tail" in self._wants:
            facts["tail"] = (group.prompt or "")[-TAIL_CHARACTERS:]
        self.channel.send(wire.Accepted(self.number, facts))

    @property
    def wants_more(self) -> bool:
        return not self._final_only and not self.channel.blocked

    def put(self, delta: RequestOutput) -> None:
        end = _end(delta) if delta.finished else None
        if delta.finished:
            self.channel.readers.pop(self.number, None)
        prompt = None
        if delta.prompt_logprobs is not None:
            prompt = [self._logprobs(each) for each in delta.prompt_logprobs]
        outputs = [self._output(each) for each in delta.outputs]
        if outputs or end is not None or prompt is not None:
            self.channel.items.append([self.number, outputs, end, prompt])
        if outputs and not self._final_only:
            now = time.perf_counter()
            if self._last_put is not None:
                self.channel.emissions.gaps.add(now - self._last_put)
            self._last_put = now

    def fail(self, error: Exception) -> None:
        self.channel.readers.pop(self.number, None)
        self.channel.emissions.num_failed += 1
        self.channel.send(wire.Refused(self.number, type(error).__name__, str(error)))

    def _output(self, each: CompletionOutput) -> list[Any]:
        more, logprobs = None, None
        if each.logprobs is not None:
            logprobs = [self._logprobs(position) for position in each.logprobs]
        if self._ids or each.logprobs is not None or each.suspect_from is not None:
            more = {
                "ids": each.token_ids,
                "logprobs": logprobs,
                "suspect_from": each.suspect_from,
            }
        return [
            each.index,
            each.text,
            len(each.token_ids),
            each.finish_reason,
            each.stop_reason,
            more,
        ]

    def _logprobs(self, entries: Logprobs | None) -> list[list[Any]] | None:
        """``[id, logprob, text, bytes or None]`` of each, the chosen token first."""
        if entries is None:
            return None
        return [
            [token, max(each.logprob, LOWEST_LOGPROB), *self._texts.of(token, each.decoded_token)]
            for token, each in entries.items()
        ]


def flush_all(readers: Sequence[WireReader]) -> None:
    """One frame for each HTTP process."""
    for channel in {each.channel for each in readers}:
        if channel.items:
            channel.flush()


def _end(delta: RequestOutput) -> dict[str, Any]:
    times = delta.metrics
    return {
        "cached": times.num_cached_tokens,
        "queue": _between(times.arrival_time, times.first_scheduled_time),
        "first_token": _between(times.arrival_time, times.first_token_time),
    }


def _between(begin: float, end: float | None) -> float | None:
    return None if end is None else end - begin

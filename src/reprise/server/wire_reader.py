"""What an HTTP process gets of one request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from reprise.engine import Acceptance
from reprise.engine.driver import TextReader
from reprise.outputs import CompletionOutput, Logprobs, RequestOutput
from reprise.processes.channel import Channel
from reprise.server import wire
from reprise.server.facts import Emissions
from reprise.server.token_bytes import TokenBytes

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for, as in the OpenAI API and vLLM."""
TAIL_CHARACTERS = 64


class WireReader:
    """Puts what is new of one request on the channel of its HTTP process."""

    def __init__(
        self,
        channel: Channel,
        request: wire.Generate,
        name: str,
        texts: TokenBytes,
        emissions: Emissions,
    ) -> None:
        self.channel = channel
        self._emissions = emissions
        self.number = request.number
        self.name = name
        """The engine's."""
        self.called = request.name
        """The caller's."""
        self.chat = request.chat is not None
        self._wants = frozenset(request.wants)
        self._ids = "ids" in self._wants
        self._sizes = "sizes" in self._wants
        self._skip_special = request.params.get("skip_special_tokens") is not False
        self._final_only = request.params.get("output_kind") == "FINAL_ONLY"
        several = request.params.get("n") not in (None, 1)
        self._short = not (several or self._final_only or self._ids)
        """Texts that come alone are short items."""
        self._texts = texts
        self._last_put: float | None = None

    def accepted(self, group: Acceptance) -> None:
        facts: dict[str, Any] = {}
        ids = group.prompt_token_ids
        facts["prompt_tokens"] = len(ids)
        if "prompt" in self._wants:
            whole = group.prompt is not None and group.params.truncate_prompt_tokens is None
            facts["prompt"] = group.prompt if whole else self._texts.text(ids)
            facts["first"] = [ids[0], self._texts.text(ids[:1])]
        if "prompt_ids" in self._wants:
            facts["prompt_ids"] = ids
        if "tail" in self._wants:
            facts["tail"] = (group.prompt or "")[-TAIL_CHARACTERS:]
        self.channel.messages.append(wire.Accepted(self.number, facts))

    @property
    def wants_more(self) -> bool:
        return not self._final_only and not self.channel.blocked

    @property
    def texts(self) -> TextReader | None:
        return self if self._short else None

    def put_text(self, text: str, token_ids: list[int]) -> None:
        told = self._sizes_of(token_ids) if self._sizes else len(token_ids)
        self.channel.items.append([self.number, text, told])
        self._count_gap()

    def put(self, delta: RequestOutput) -> None:
        plain = not delta.finished and delta.prompt_logprobs is None and delta.outputs
        if self._short and plain:
            (only,) = delta.outputs
            if only.logprobs is None and only.suspect_from is None:
                self.put_text(only.text, only.token_ids)
                return
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
            self._count_gap()

    def _count_gap(self) -> None:
        now = time.perf_counter()
        if self._last_put is not None:
            self._emissions.gaps.add(now - self._last_put)
        self._last_put = now

    def fail(self, error: Exception) -> None:
        self.channel.readers.pop(self.number, None)
        self._emissions.num_failed += 1
        self.channel.send(wire.Refused(self.number, type(error).__name__, str(error)))

    def _output(self, each: CompletionOutput) -> list[Any]:
        more, logprobs = None, None
        if each.logprobs is not None:
            logprobs = [self._logprobs(position) for position in each.logprobs]
        asked = self._ids or self._sizes
        if asked or each.logprobs is not None or each.suspect_from is not None:
            more = {
                "ids": each.token_ids if self._ids else [],
                "sizes": self._sizes_of(each.token_ids),
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

    def _sizes_of(self, ids: Sequence[int]) -> list[int]:
        """Bytes of each token, if they are wanted."""
        if not self._sizes:
            return []
        return [self._texts.size(each, self._skip_special) for each in ids]

    def _logprobs(self, entries: Logprobs | None) -> list[list[Any]] | None:
        """``[id, logprob, text, bytes or None]`` of each, the chosen token first."""
        if entries is None:
            return None
        return [
            [token, max(each.logprob, LOWEST_LOGPROB), *self._texts.of(token, each.decoded_token)]
            for token, each in entries.items()
        ]


def _end(delta: RequestOutput) -> dict[str, Any]:
    times = delta.metrics
    return {
        "cached": times.num_cached_tokens,
        "queue": _between(times.arrival_time, times.first_scheduled_time),
        "first_token": _between(times.arrival_time, times.first_token_time),
    }


def _between(begin: float, end: float | None) -> float | None:
    return None if end is None else end - begin

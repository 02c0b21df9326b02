"""One request to an OpenAI endpoint, timed while its answer streams."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from reprise.errors import RequestError, describe

SHOWN = 300
"""Characters of a server's error that are repeated."""


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    text: str | list[int] | list[dict[str, Any]]
    """Or token ids, which the completions endpoint takes, or messages of a chat."""
    output_tokens: int
    """To generate, at most where the text may end before."""


@dataclass
class Answer:
    """Times are of ``time.perf_counter``."""

    sent: float
    due: float = 0.0
    """When it was to be sent."""
    arrivals: list[float] = field(default_factory=list)
    """Of each chunk with text."""
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    """As the server counts them."""
    error: str | None = None
    kind: str | None = None
    """Of the error, in a word or two: those of a kind are counted together."""

    def fail(self, kind: str, error: str) -> None:
        """Note that no answer came, or a broken one."""
        self.kind, self.error = kind, error[:SHOWN]

    @property
    def to_first(self) -> float:
        """Seconds to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def total(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def each_further(self) -> float | None:
        """Seconds for each token behind the first, on average; None if there is none."""
        further = self.output_tokens - 1
        return (self.total - self.to_first) / further if further > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks with text, which may hold several tokens."""
        return [b - a for a, b in itertools.pairwise(self.arrivals)]


class Endpoint:
    """A server's completions or chat completions.

    Args:
        base_url: With or without ``/v1``.
        chat: Ask for chat completions.
        model: As the server calls it; None: its first one.
        api_key: For the server.
        fields: Further ones of every request, such as ``ignore_eos``.
        timeout: Seconds without a byte after which a request has failed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        chat: bool = False,
        model: str | None = None,
        api_key: str | None = None,
        fields: Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.chat = chat
        self.path = "/v1/chat/completions" if chat else "/v1/completions"
        self.model = model
        self._api_key = api_key
        self._timeout = timeout
        self._fields = dict(fields or {})
        self._client = httpx.AsyncClient(
            base_url=self.base_url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy would be measured too
        )

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that make an equal one, in another process."""
        return {
            "base_url": self.base_url,
            "chat": self.chat,
            "model": self.model,
            "api_key": self._api_key,
            "fields": self._fields,
            "timeout": self._timeout,
        }

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def find_model(self) -> str:
        """The name to ask for.

        Raises:
            RequestError: The server does not answer, or has no model.
        """
        if self.model is None:
            try:
                reply = await self._client.get("/v1/models")
                listed = reply.raise_for_status().json()["data"]
                self.model = str(listed[0]["id"])
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
                reason = describe(error)[:SHOWN]
                raise RequestError(
                    f"base_url={self.base_url!r}: /v1/models names no model ({reason}): is a "
                    "server there? Else give model="
                ) from None
        return self.model

    async def ask(self, prompt: Prompt, due: float | None = None) -> Answer:
        """Send and read to the end. What goes wrong is the answer's ``error``.

        Args:
            prompt: To send.
            due: When it was to be sent; None: now.
        """
        now = time.perf_counter()
        answer = Answer(now, now if due is None else due)
        try:
            async with self._client.stream("POST", self.path, json=self._body(prompt)) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    answer.fail(f"status {reply.status_code}", reply.text)
                else:
                    await self._read(reply, answer)
        except httpx.TimeoutException as error:
            answer.fail("timeout", describe(error))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            answer.fail("connection", describe(error))
        answer.ended = time.perf_counter()
        if answer.error is None:
            _look_for_faults(answer)
        return answer

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": prompt.text}
        if self.chat:
            asked = {"messages": prompt.text}
            if isinstance(prompt.text, str):
                asked = {"messages": [{"role": "user", "content": prompt.text}]}
        return {
            "model": self.model,
            **asked,
            "max_tokens": prompt.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }

    async def _read(self, reply: httpx.Response, answer: Answer) -> None:
        ended = False
        async for line in reply.aiter_lines():
            if not line.startswith("data:"):
                continue
            now, data = time.perf_counter(), line[5:].strip()
            if data == "[DONE]":
                ended = True
                continue
            try:
                event = json.loads(data)
                if "error" in event:
                    answer.fail("error in the stream", str(event["error"]))
                    return
                usage = event.get("usage")
                if usage:
                    answer.input_tokens = int(usage["prompt_tokens"])
                    answer.output_tokens = int(usage["completion_tokens"])
                if any(map(_has_text, event.get("choices") or ())):
                    answer.arrivals.append(now)
            except (ValueError, TypeError, LookupError, AttributeError):
                answer.fail("no such event", f"what came is no chunk: {data}")
                return
        if not ended:
            answer.fail("stream cut off", "the stream ended before [DONE]")


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or choice
    names = ("text", "content", "reasoning", "reasoning_content")
    return any(delta.get(each) for each in names)


def _look_for_faults(answer: Answer) -> None:
    if not answer.output_tokens:
        answer.fail(
            "no usage", "the server sent no usage: it does not know stream_options.include_usage"
        )
    elif not answer.arrivals:
        answer.fail("no text", "no text came")

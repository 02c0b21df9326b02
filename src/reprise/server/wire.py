"""What an HTTP process and the engine's process say to each other: plain data in frames.

A frame is the length of a JSON array (4 bytes, little-endian) and the array: the kind of message,
then its fields. Both sides are of one installation; :data:`PROTOCOL` is compared all the same, so
that a half-replaced one says so and does not misread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

PROTOCOL = 1
_LENGTH = 4
_MOST = 1 << 30
"""Bytes of a frame. Bodies are limited long before."""


class Generate(NamedTuple):
    """Compute a request."""

    number: int
    """That the HTTP process gave it."""
    name: str
    """That callers know it by, for the :class:`Call` of ``abort``."""
    prompt: dict[str, Any] | None
    """As :meth:`reprise.LLM.generate` takes it, and ``add_special_tokens``; None for ``chat``."""
    chat: dict[str, Any] | None
    """Arguments of :func:`reprise.engine.chat_prompt`, and ``cache_salt``."""
    params: dict[str, Any]
    """Of :class:`reprise.SamplingParams`, those that are not the default; ``output_kind`` by its
    name."""
    priority: int
    wants: list[str]
    """Of ``prompt`` (its text, and ``first``: id and text of its first token), ``prompt_ids``,
    ``tail`` (the end of its text), ``ids`` (of the outputs)."""


class Leave(NamedTuple):
    """The caller is gone."""

    number: int


class Call(NamedTuple):
    """Ask something beside generation; the answer is a :class:`Reply` or a :class:`Refused`."""

    number: int
    what: str
    arguments: dict[str, Any]


class Hello(NamedTuple):
    """The engine is loaded."""

    protocol: int
    facts: dict[str, Any]


class Accepted(NamedTuple):
    """The engine has a request."""

    number: int
    facts: dict[str, Any]
    """``prompt_tokens``, and what was wanted of the prompt."""


class Refused(NamedTuple):
    """A request or call failed."""

    number: int
    kind: str
    """Name of the exception."""
    message: str


class Reply(NamedTuple):
    """Of a :class:`Call`."""

    number: int
    result: Any


class Deltas(NamedTuple):
    """What is new of all requests of one HTTP process, once a step."""

    items: list[list[Any]]
    """``[number, outputs, end, prompt_logprobs]``. An output is ``[index, text, number of tokens,
    finish_reason, stop_reason, more]``, where ``more`` is None or has ``ids``, ``logprobs`` and
    ``suspect_from``. ``end`` is None, or what is known of the request when it has finished."""


Message = Generate | Leave | Call | Hello | Accepted | Refused | Reply | Deltas

_CLASSES: tuple[type[Any], ...] = (
    Generate, Leave, Call, Hello, Accepted, Refused, Reply, Deltas,
)  # fmt: skip
_KINDS = {each: number for number, each in enumerate(_CLASSES)}


def frame(message: Message) -> bytes:
    """A message as it is sent."""
    body = orjson.dumps([_KINDS[type(message)], *message])
    return len(body).to_bytes(_LENGTH, "little") + body


class Frames:
    """Cuts what comes from a socket into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, received: bytes) -> Iterator[Any]:
        """The messages that are complete with these bytes.

        Raises:
            ValueError: It is no frame of ours.
        """
        if not self._bytes and len(received) > _LENGTH:
            length = int.from_bytes(received[:_LENGTH], "little")
            if length == len(received) - _LENGTH:  # mostly a frame comes alone
                yield _message(received[_LENGTH:])
                return
        self._bytes += received
        begin = 0
        while len(self._bytes) - begin >= _LENGTH:
            length = int.from_bytes(self._bytes[begin : begin + _LENGTH], "little")
            if length > _MOST:
                raise ValueError(f"a frame of {length} bytes: this is not the protocol")
            end = begin + _LENGTH + length
            if len(self._bytes) < end:
                break
            yield _message(bytes(self._bytes[begin + _LENGTH : end]))
            begin = end
        del self._bytes[:begin]


def _message(body: bytes) -> Any:
    kind, *fields = orjson.loads(body)
    return _CLASSES[kind](*fields)

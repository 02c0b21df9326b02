"""What an engine's process and its clients say to each other.

A frame is the length of a body (8 bytes, little-endian) and the body, a message. How a message
becomes a body is for the two sides: HTTP processes say it in JSON (:mod:`reprise.server.wire`), a
program and its replicas (:mod:`reprise.replicas`) in Python's own form, since they exchange log
probabilities of whole vocabularies, and reports.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_LENGTH = 8
_MOST = 1 << 36
"""Bytes of a frame. Bodies are limited long before."""


class Generate(NamedTuple):
    """Compute a request."""

    number: int
    """Number that its client gave it."""
    name: str
    """Name that callers know it by, for the :class:`Call` of ``abort``."""
    prompt: Any
    """From HTTP processes: as :meth:`reprise.LLM.generate` takes it, and ``add_special_tokens``, or
    None for ``chat``. Else what :meth:`reprise.engine.Frontend.prepare` gave."""
    chat: dict[str, Any] | None
    """Arguments of :func:`reprise.engine.chat_prompt`, and ``cache_salt``."""
    params: Any
    """From HTTP processes: the fields of :class:`reprise.SamplingParams` that are not the default;
    ``output_kind`` by its name. Else what :meth:`reprise.engine.Frontend.prepare_params` gave."""
    priority: int
    wants: list[str]
    """Of HTTP processes: of ``prompt`` (its text, and ``first``: id and text of its first token),
    ``prompt_ids``, ``tail`` (the end of its text), ``ids`` (of the outputs) and ``sizes`` (bytes
    that each adds to the text). Of a program: of ``whole`` (all outputs at once)."""
    ordinal: int | None = None
    """Of all requests of a program, which of them draw without a seed of their own; None: the
    engine counts."""
    more: bool = False
    """From HTTP processes: others are to come behind it in a moment."""


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
    output: Any = None
    """For a program: what there was of the request that failed, packed as a delta is."""


class Reply(NamedTuple):
    """The answer to a :class:`Call`."""

    number: int
    result: Any


class Deltas(NamedTuple):
    """What is new of all requests of one process, once a step."""

    items: list[Any]
    """For a program: of :mod:`reprise.replicas.deltas`. For HTTP processes: ``[number, text,
    tokens]`` where a request's only completion has a text and nothing else; ``tokens`` is how many
    they are, or, where sizes are wanted, the bytes of each. Else ``[number, outputs, end,
    prompt_logprobs]``. An output is ``[index, text, number of tokens, finish_reason,
    stop_reason, more]``, where ``more`` is None or has ``ids``, ``sizes``, ``logprobs``
    and ``suspect_from``. ``end`` is None, or what is known of the request when it has finished."""


Message = Generate | Leave | Call | Hello | Accepted | Refused | Reply | Deltas | list[Generate]
"""A list: requests that are to begin together, from a program."""


def framed(body: bytes) -> bytes:
    """A body as it is sent."""
    return len(body).to_bytes(_LENGTH, "little") + body


def frame(message: Message) -> bytes:
    """A message as a program and its replicas send it."""
    return framed(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


class Frames:
    """Cuts what comes from a socket into messages.

    Args:
        message: Makes one of a body.
    """

    def __init__(self, message: Callable[[bytes], Any] = pickle.loads) -> None:
        self._message = message
        self._bytes = bytearray()

    def feed(self, received: bytes) -> Iterator[Any]:
        """The messages that are complete with these bytes.

        Raises:
            ValueError: It is no frame of ours.
        """
        if not self._bytes and len(received) > _LENGTH:
            length = int.from_bytes(received[:_LENGTH], "little")
            if length == len(received) - _LENGTH:  # mostly a frame comes alone
                yield self._message(received[_LENGTH:])
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
            yield self._message(bytes(self._bytes[begin + _LENGTH : end]))
            begin = end
        del self._bytes[:begin]

"""What an HTTP process and the engine's process say to each other: plain data in frames.

The body of a frame is a JSON array: the kind of message, then its fields. Both sides are of one
installation; :data:`PROTOCOL` is compared all the same, so that a half-replaced one says so and
does not misread.
"""

from __future__ import annotations

from typing import Any

import orjson

from reprise.processes import wire
from reprise.processes.wire import (
    Accepted,
    Call,
    Deltas,
    Generate,
    Hello,
    Leave,
    Message,
    Refused,
    Reply,
    framed,
)

__all__ = [
    "PROTOCOL",
    "Accepted",
    "Call",
    "Deltas",
    "Frames",
    "Generate",
    "Hello",
    "Leave",
    "Message",
    "Refused",
    "Reply",
    "frame",
]

PROTOCOL = 4

_CLASSES: tuple[type[Any], ...] = (
    Generate, Leave, Call, Hello, Accepted, Refused, Reply, Deltas,
)  # fmt: skip
_KINDS = {each: number for number, each in enumerate(_CLASSES)}


def frame(message: Message) -> bytes:
    """A message as it is sent."""
    return framed(orjson.dumps([_KINDS[type(message)], *message]))


class Frames(wire.Frames):
    """Cuts what comes from a socket into messages."""

    def __init__(self) -> None:
        super().__init__(_message)


def _message(body: bytes) -> Any:
    kind, *fields = orjson.loads(body)
    return _CLASSES[kind](*fields)

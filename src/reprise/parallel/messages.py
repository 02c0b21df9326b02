"""What the leader says to its followers, in one order: everything that changes a rank's state."""

from __future__ import annotations

import pickle
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from reprise.config import EngineConfig
from reprise.distributed import Group, Host
from reprise.errors import RanksError
from reprise.parallel.seat import Seat
from reprise.shape import StepShape

_HEADER = struct.Struct("<BII")
_SHAPE = struct.Struct("<?IHH")


class Kind(IntEnum):
    START = 0
    """Make a runner: a :class:`Start`, pickled."""
    STEP = 1
    """Submit a step: :class:`reprise.parallel.wire.Encoder`'s bytes."""
    SAMPLE = 2
    """Draw from the step that was submitted last: masks, pickled, or nothing."""
    FORGET = 3
    """A step failed: trust nothing that steps leave behind."""
    FORGET_DRAWS = 4
    PROVE = 5
    """Prove graphs further."""
    SAME = 6
    """What the leader has drawn so far, as :class:`Drawn` counts it: a rank that has drawn anything
    else ends."""
    STOP = 7
    STEP_AMONG = 8
    """Submit a step while other engines compute theirs: :func:`pack_shape`'s bytes of what all of
    these are padded to, then those of ``STEP``."""


@dataclass(frozen=True)
class Start:
    """All that a follower has to know of its engine."""

    options: dict[str, Any]
    """Of :class:`EngineConfig`."""
    devices: tuple[str, ...]
    """Of each rank, as its host calls it."""
    hosts: tuple[Host, ...]
    """Of each rank; none: all are on this one."""
    group: str
    """The group's name."""
    port: int
    """Of the store through which process groups are made, on the leader's host."""
    timeout: float
    """Seconds that a rank waits for others."""
    setup: tuple[str, ...]
    """``module:function`` to be called with the rank beforehand: tests put faults in so."""
    seat: Seat | None = None
    """Of the engine, if its experts are shared with others and all are on this machine."""

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(**self.options)

    def group_of(self, rank: int) -> Group:
        """As a rank has it."""
        return Group(self.group, rank, len(self.devices), self.hosts)


class Drawn:
    """A checksum of all tokens that a rank has drawn."""

    def __init__(self) -> None:
        self.checksum = 0

    def note(self, sampled: Sequence[Sequence[int]]) -> None:
        """Take note of a step's tokens, which have arrived."""
        tokens = array("q", [token for each in sampled for token in each])
        self.checksum = zlib.crc32(tokens.tobytes(), self.checksum)


def pack(kind: Kind, number: int, retired: int, content: bytes = b"") -> bytes:
    """A message.

    Args:
        kind: What to do.
        number: Of the message, from 1 on: a rank that misses one must not go on.
        retired: Steps whose results the leader has waited for so far: what a rank's host knows of
            them, it knows from then on.
        content: With what.
    """
    return _HEADER.pack(kind, number & 0xFFFFFFFF, retired & 0xFFFFFFFF) + content


def unpack(message: bytes, number: int) -> tuple[Kind, int, bytes]:
    """Kind, retired steps and content.

    Raises:
        RanksError: It is not message ``number``.
    """
    kind, found, retired = _HEADER.unpack_from(message)
    if found != number & 0xFFFFFFFF:
        raise RanksError(f"message {number} from the leader was lost: number {found} came")
    return Kind(kind), retired, message[_HEADER.size :]


def pack_shape(shape: StepShape) -> bytes:
    return _SHAPE.pack(
        shape.phase == "mixed", shape.num_tokens, shape.num_requests, shape.query_len
    )


def unpack_shape(content: bytes) -> tuple[StepShape, bytes]:
    """A shape, and what is behind it."""
    mixed, tokens, requests, length = _SHAPE.unpack_from(content)
    shape = StepShape.mixed(tokens, requests) if mixed else StepShape.decode(requests, length)
    return shape, content[_SHAPE.size :]


def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 5)

"""Whether ranks may sum by reading each other's memory: proven before anything relies on it."""

from __future__ import annotations

import logging
import threading

import torch

from reprise import ops
from reprise.distributed import Agreement, Communicator
from reprise.errors import describe
from reprise.ops import OpTable
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

COUNTS = (8, 5000, 100_000)
"""Numbers of a sum: of one program, of some, of many."""
PATIENCE_SECONDS = 60.0
"""A sum that takes longer never ends."""


def prove_direct(communicator: Communicator, platform: Platform, agreement: Agreement) -> None:
    """Give up the memory that ranks read from each other, on all of them, unless sums over it are
    right. Every rank calls it."""
    buffer = communicator.symmetric
    if buffer is None:
        return
    if ops.all_reduce.implementations["one_shot"].unusable(platform) is not None:
        communicator.drop_symmetric()  # alike on all: ranks have the same platform
        return
    patience = threading.Timer(PATIENCE_SECONDS, buffer.give_up)
    patience.daemon = True
    patience.start()
    reason: str | None = "another rank's are"
    try:
        right = _sums_are_right(communicator, platform)
        reason = reason if right else "they are wrong"
    except Exception as error:  # drivers and compilers fail with errors of many types
        right, reason = False, describe(error)
    patience.cancel()
    if not agreement.all(right):
        logger.warning("ranks: sums over memory that all read are not used: %s", reason)
        communicator.drop_symmetric()


def _sums_are_right(communicator: Communicator, platform: Platform) -> bool:
    """Of whole numbers that every dtype has, and whose sums it rounds alike in any order."""
    group = communicator.group
    table = OpTable(platform, {"all_reduce": "one_shot"})
    right = True
    with table.computing():
        for turn, count in enumerate(COUNTS * 2):
            x = part(group.rank, turn, count).to(platform.device, platform.default_dtype)
            ops.all_reduce(x, group.name)
            total = sum(part(rank, turn, count) for rank in range(group.size))
            assert isinstance(total, torch.Tensor)
            right &= bool((x == total.to(x.device, x.dtype)).all())
    return right


def part(rank: int, turn: int, count: int) -> torch.Tensor:
    """What a rank adds: [count] int64, from 0 to 256, so that bfloat16 has each exactly."""
    return (torch.arange(count) % 23 + turn) * (1 + rank % 8)

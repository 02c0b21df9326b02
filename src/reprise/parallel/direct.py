"""Whether ranks may sum by reading each other's memory: proven before anything relies on it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import torch

from reprise import ops
from reprise.distributed import Agreement, Communicator
from reprise.distributed.symmetric import SymmetricBuffer
from reprise.errors import ConfigError, describe
from reprise.ops import OpTable
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

COUNTS = (8, 5000, 100_000)
"""Numbers of a sum: of one program, of some, of many."""
SUMS = ("all_reduce", "all_reduce_add")
ROWS = ("dispatch", "combine")
NEED_IT = "triton"
"""Implementations that compute in this memory."""
PATIENCE_SECONDS = 60.0
"""A sum that takes longer never ends."""


def prove_direct(
    communicator: Communicator,
    platform: Platform,
    agreement: Agreement,
    chosen: Mapping[str, str],
    used_by: Sequence[str] = SUMS,
) -> None:
    """Give up the memory that ranks read from each other, on all of them, unless sums over it are
    right. Every rank calls it.

    Args:
        communicator: Of the ranks.
        platform: Of this one; the others have the same.
        agreement: Of the ranks.
        chosen: Implementations that the user asked for by name, by op.
        used_by: The ops that compute in this memory.

    Raises:
        ConfigError: One of them needs the memory, and there is none. All ranks raise it.
    """
    platform.activate()  # kernels run on the thread's device, wherever their tensors are
    unusable = ops.all_reduce.implementations[NEED_IT].unusable(platform)
    if communicator.symmetric is not None and unusable is not None:
        communicator.drop_symmetric(unusable)  # alike on all
    if communicator.symmetric is not None:
        _prove(communicator, communicator.symmetric, platform, agreement)
    wanted = [
        f"{name}={each}" for name, each in chosen.items() if name in used_by and each == NEED_IT
    ]
    if wanted and communicator.symmetric is None:
        raise ConfigError(
            f"--op {wanted[0]}: these ranks have no memory that all of them read directly "
            f"({unusable or communicator.unreached}); leave it out, and {platform.dist_backend} "
            "sums"
        )


def _prove(
    communicator: Communicator,
    buffer: SymmetricBuffer,
    platform: Platform,
    agreement: Agreement,
) -> None:
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
        communicator.drop_symmetric(f"sums over it: {reason}")


def _sums_are_right(communicator: Communicator, platform: Platform) -> bool:
    """Of whole numbers that every dtype has, and whose sums it rounds alike in any order."""
    group = communicator.group
    right = True
    with OpTable(platform, {"all_reduce": NEED_IT}).computing():
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

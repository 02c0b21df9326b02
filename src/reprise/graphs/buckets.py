"""The sizes that graphs are captured for."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reprise.errors import ConfigError
from reprise.graphs.plan import Executor, GraphPlan
from reprise.shape import PHASES, Phase, StepShape

logger = logging.getLogger(__name__)

LARGEST_DECODE = 512
LARGEST_MIXED = 4096
"""Larger mixed steps gain nothing from graphs: the device is busy longer than the host."""


@dataclass(frozen=True)
class Buckets:
    """Ascending sizes per phase: requests in ``decode``, tokens in ``mixed``."""

    decode: tuple[int, ...]
    mixed: tuple[int, ...]

    def sparse(self) -> Buckets:
        """Fewer decode sizes: each at least twice the one before; the largest stays."""
        kept: list[int] = []
        for size in self.decode:
            if not kept or size >= 2 * kept[-1]:
                kept.append(size)
        if self.decode and kept[-1] != self.decode[-1]:
            kept.append(self.decode[-1])
        return replace(self, decode=tuple(kept))

    def of(self, phase: Phase) -> tuple[int, ...]:
        return self.decode if phase == "decode" else self.mixed

    def bucket_for(self, phase: Phase, size: int) -> int | None:
        """The smallest bucket that holds ``size``; None: it is above the largest."""
        sizes = self.of(phase)
        index = bisect.bisect_left(sizes, size)
        return sizes[index] if index < len(sizes) else None

    def shapes(
        self, plan: GraphPlan[Executor], query_lens: Sequence[int], max_requests: int
    ) -> list[StepShape]:
        """What is captured of all phases that have an executor, largest first.

        Args:
            plan: The executors.
            query_lens: New tokens of a request in decode steps.
            max_requests: Most requests in a step.
        """
        found = []
        if plan.decode != "none":
            found += [StepShape.decode(size, each) for each in query_lens for size in self.decode]
        if plan.mixed != "none":
            found += [StepShape.mixed(size, min(size, max_requests)) for size in self.mixed]
        return sorted(found, key=lambda each: (-each.num_tokens, PHASES.index(each.phase)))


def default_buckets(max_requests: int, max_tokens: int) -> Buckets:
    """Powers of two up to 32 requests, then every 32, from 192 on every 64; 32 tokens, and powers
    of two from 128 on. Each has to be captured and proven, while a row of padding costs little:
    steps of up to some 150 tokens wait for the weights (on an H200 as on other accelerators, two
    bytes a weight over what the memory brings take as long as its products with so many tokens).

    Args:
        max_requests: Most requests in a step.
        max_tokens: Most new tokens in a step.
    """
    decode = [1, 2, 4, 8, 16, *range(32, 192, 32), *range(192, LARGEST_DECODE + 1, 64)]
    mixed = [32, *(1 << power for power in range(7, LARGEST_MIXED.bit_length()))]
    return Buckets(
        decode=_up_to(decode, min(max_requests, LARGEST_DECODE)),
        mixed=_up_to(mixed, min(max_tokens, LARGEST_MIXED)),
    )


def parse_buckets(text: str | None, max_requests: int, max_tokens: int) -> Buckets:
    """Read ``--graph-buckets``: ``1,2,4,8``, or ``decode=1,2,4;mixed=64,128``.

    A phase that is left out keeps its default sizes. Sizes above what a step can hold are dropped.

    Raises:
        ConfigError: Not a list of positive whole numbers.
    """
    default = default_buckets(max_requests, max_tokens)
    if text is None or not text.strip():
        return default
    found: dict[str, tuple[int, ...]] = {}
    if "=" in text:
        for part in text.split(";"):
            phase, equals, listed = (each.strip() for each in part.partition("="))
            if not equals or phase not in PHASES or phase in found:
                raise _bad(text)
            found[phase] = _numbers(listed, text)
    else:
        found = dict.fromkeys(PHASES, _numbers(text, text))
    limits = {"decode": max_requests, "mixed": max_tokens}
    kept = {phase: tuple(n for n in sizes if n <= limits[phase]) for phase, sizes in found.items()}
    for phase, sizes in found.items():
        if len(kept[phase]) < len(sizes):
            logger.info("graph_buckets: %s sizes above %d are dropped", phase, limits[phase])
    return Buckets(kept.get("decode", default.decode), kept.get("mixed", default.mixed))


def _up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    kept = [each for each in sizes if each < limit]
    return (*kept, limit)


def _numbers(text: str, whole: str) -> tuple[int, ...]:
    parts = [each.strip() for each in text.split(",") if each.strip()]
    if not parts or any(not each.isdigit() or int(each) == 0 for each in parts):
        raise _bad(whole)
    return tuple(sorted({int(each) for each in parts}))


def _bad(text: str) -> ConfigError:
    return ConfigError(
        f"graph_buckets={text!r}: expected sizes such as 1,2,4,8 or decode=1,2,4;mixed=64,128"
    )

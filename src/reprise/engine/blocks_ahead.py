"""Blocks that a request gets before it needs them."""

from __future__ import annotations

from reprise.cache import CacheManager
from reprise.request import Request

BLOCKS_AHEAD = 8
"""Most blocks that a request gets before it needs them, where there are plenty: a step that sends
no block tables costs the device and the host less."""
STEPS_AHEAD = 16
"""When one request needs a block, those that need one within so many steps get theirs too."""
AHEAD_FRACTION = 1 / 16
"""Of the free blocks, the most that all running requests together get ahead."""
LEAST_FREE = 2
"""Free blocks for each running request, with which each gets one ahead all the same."""


class BlocksAhead:
    """Gives blocks for tokens to come, so that most steps change no block table.

    Args:
        cache: Has the blocks.
        most: Blocks of a request.
        width: Most tokens that a decode step computes for it.
    """

    def __init__(self, cache: CacheManager, most: int, width: int) -> None:
        self._cache = cache
        self._most = most
        self._least = STEPS_AHEAD * width

    def give(self, request: Request, num_running: int) -> None:
        """Give a request blocks, if it has none for its next steps and there are plenty.

        Args:
            request: It runs.
            num_running: Requests that do.
        """
        cache, computed = self._cache, request.num_computed_tokens
        each = cache.room / max(1, num_running)
        ahead = max(int(each * AHEAD_FRACTION), int(each >= LEAST_FREE))
        ahead = min(ahead, self._most) * cache.block_size
        wanted = min(computed + ahead, request.max_total_tokens - 1)
        if request.num_places - computed < self._least and wanted > request.num_places:
            cache.grow(request, computed, wanted)

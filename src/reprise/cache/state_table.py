"""What a request owns of a table of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reprise.cache.block_pool import NULL_BLOCK
from reprise.cache.request_table import CacheUser, Checkpoint, Copy, RequestTable
from reprise.cache.spec import NEVER


class StateTable(RequestTable):
    """One state a request, and copies of states as they were behind some of their tokens.

    Others that begin with the same tokens go on from a copy of the copy. A checkpoint that is not
    being copied has no owner: a request that needs a state takes its place.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replays: dict[int, int] = {}
        """Of the checkpoints that are offered, by slot."""

    @property
    def num_used(self) -> int:
        """States that have an owner; a pool of states is of one table."""
        return self.pool.num_used

    @property
    def _rows(self) -> int:
        """Of a request: its state, and what may be beside it."""
        return len(self.lifetime.needed(0, 1, self.size))

    def least_cost(self, request: CacheUser) -> int:
        return self._rows

    def cost(self, request: CacheUser, hit: Sequence[int]) -> int:
        # The checkpoint is not to be given out before it is copied.
        return self._rows + sum(self.pool.is_free(each) for each in hit if each != NULL_BLOCK)

    def share(self, hit: Sequence[int]) -> None:
        self.pool.share([each for each in hit if each != NULL_BLOCK])

    def admit(self, request: CacheUser, hit: Sequence[int]) -> list[int]:
        return self.pool.allocate(self._rows)

    def unclaimed(self, request: CacheUser, begin: int, end: int) -> int:
        return 0

    def grow(self, request: CacheUser, begin: int, end: int) -> None:
        """Nothing to do: a request has its one state."""

    def places(self, request: CacheUser) -> int:
        return NEVER

    def replay(self, block: int) -> int:
        """Of the tokens behind which a checkpoint is, how many it has beside the state."""
        return self._replays.get(block, 0)

    def checkpoint(
        self, request: CacheUser, length: int, replay: int, *, certain: bool
    ) -> tuple[Copy, Checkpoint] | None:
        """Keep the request's state as it is behind ``length`` tokens, if there is a free place for
        it and no copy of it yet."""
        known = length <= len(request.token_ids)
        if self.pool.room < 1 or (known and self.index.find(self.key(request, length))):
            return None
        (slot,) = self.pool.allocate(1)
        kept = Checkpoint(self, length, slot, replay, certain)
        request.checkpoints.append(kept)
        return Copy(self.number, request.tables[self.number][0], slot), kept

    def commit(self, request: CacheUser, num_tokens: int, shares: bool) -> int:
        for each in [each for each in request.checkpoints if each.table is self]:
            if not each.certain:
                each.certain = each.length <= num_tokens
                if not each.certain:
                    request.checkpoints.remove(each)
                    self.pool.free([each.slot])
                    continue
            if each.length > num_tokens or each.sound is None:
                continue
            request.checkpoints.remove(each)
            self._offer(request, each, shares)
        return self.commit_at(request)

    def _offer(self, request: CacheUser, kept: Checkpoint, shares: bool) -> None:
        # A state that is no number would spoil every request that begins with these tokens.
        if shares and kept.certain and kept.sound:
            self._insert(request, kept.length, kept.slot, kept.replay)
        self.pool.free([kept.slot])

    def _insert(self, request: CacheUser, length: int, slot: int, replay: int) -> None:
        self.index.insert(self.key(request, length), slot)
        self._replays[slot] = replay

    def commit_at(self, request: CacheUser) -> int:
        mine = [each for each in request.checkpoints if each.table is self]
        return min((each.length if each.certain else 0 for each in mine), default=NEVER)

    def leave(self, request: CacheUser, length: int) -> None:
        """The request gives its state up, which was left before its last step's tokens with these
        beside it: it becomes the checkpoint of ``length`` tokens, unless there is one."""
        if not self.index.find(self.key(request, length)):
            slot = request.tables[self.number][0]
            self._insert(request, length, slot, length - request.state_begin)

    def free(self, request: CacheUser, shares: bool) -> None:
        for each in request.checkpoints:
            if each.table is self:
                self._offer(request, each, shares)
        self.pool.free(request.tables[self.number])

"""Copies of states, which others that begin with the same tokens go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reprise.cache.request_table import CacheUser, Checkpoint, Copy
from reprise.cache.state_table import StateTable


class Checkpoints:
    """Says behind which tokens of a request its states are copied, and what is to be copied before
    a step.

    Args:
        states: The tables whose states are kept; none: nothing is copied.
        step: Others go on behind multiples of it, in tokens.
        apart: Tokens from one checkpoint to the next, where there is no better reason for one.
        shares: Whether what a request has is offered to others.
    """

    def __init__(
        self,
        states: Sequence[StateTable],
        step: int,
        apart: int,
        shares: Callable[[CacheUser], bool],
    ) -> None:
        self._states = states
        self.any = bool(states)
        """Whether there are states to copy."""
        self._step, self._apart = step, apart
        self._shares = shares
        self._copies: list[tuple[Copy, Checkpoint | None]] = []
        """What is to be copied, and what checkpoint it makes, if it makes one."""
        self._borrowed: list[tuple[StateTable, int]] = []
        """Checkpoints that are sources of these copies."""

    def resume(self, request: CacheUser, hits: Sequence[Sequence[int]]) -> None:
        """The request, which has its slots, goes on from the states that these blocks end with."""
        for table in self._states:
            source = hits[table.number][-1]
            copy = Copy(table.number, source, request.tables[table.number][0])
            self._copies.append((copy, None))
            self._borrowed.append((table, source))

    def chunk_end(self, request: CacheUser, begin: int, end: int, known: int) -> int:
        """Where a chunk had better end than at ``end``, so that a state is met where others could
        go on from it.

        Args:
            request: Whose it is.
            begin: Of the chunk.
            end: The furthest it can go.
            known: Tokens of the request.
        """
        if not self._states:
            return end
        for cut in self._cuts(request, known):
            if begin < cut < end:
                return cut
        aligned = end // self._apart * self._apart
        return aligned if begin < aligned and end < known else end

    def _cuts(self, request: CacheUser, known: int) -> tuple[int, int]:
        """Where others may go on from a request with so many known tokens: behind what it shares
        with one before it, and behind its last whole block; 0: not worth it."""
        last = (known - 1) // self._step * self._step
        return request.junction, last if last >= self._apart else 0

    def keep(
        self,
        request: CacheUser,
        length: int,
        known: int = 0,
        *,
        replay: int = 0,
        certain: bool = True,
    ) -> None:
        """Keep the request's states as they are before the step that is scheduled now, ``length``
        tokens being computed.

        Args:
            request: Whose.
            length: Its computed tokens.
            known: Of one whose known tokens are computed, how many there are.
            replay: Of the computed tokens the last ones, that are beside the states, not in them.
            certain: Else the next update tells whether so many are computed.
        """
        if length == 0 or not self._shares(request):
            return
        if length % self._apart and length not in self._cuts(request, known):
            return
        if length % self._step:
            return
        for table in self._states:
            copy = table.checkpoint(request, length, replay, certain=certain)
            if copy is not None:
                self._copies.append(copy)
                request.commit_at = min(request.commit_at, table.commit_at(request))

    def keep_behind_drafts(self, request: CacheUser, most: int, pending: int, known: int) -> None:
        """:meth:`keep` for a request that verifies drafts: between two steps its states are those
        before the tokens of the last one, which are beside them.

        Args:
            request: Whose.
            most: Its computed tokens, those drafts included that may count.
            pending: Steps of it that are under way.
            known: Tokens that it was admitted with.
        """
        if most == known:  # the last step was a chunk
            self.keep(request, most)
            return
        if pending > 1:
            return  # where the last one began is not known
        begin = len(request.token_ids) - 1 if pending else request.state_begin
        length = most // self._apart * self._apart
        if begin < length:
            replay = length - begin
            self.keep(request, length, replay=replay, certain=not pending)

    def leave(self, request: CacheUser) -> None:
        """The request ends, or is preempted, and no step of it is under way: what its states are
        behind the last step that verified drafts stays, where it would have been copied."""
        length = (len(request.token_ids) - 1) // self._apart * self._apart
        if not 0 <= request.state_begin < length or length % self._step:
            return
        for table in self._states:
            table.leave(request, length)

    def take_copies(self) -> list[tuple[Copy, Checkpoint | None]]:
        """The copies to be made before the step that is scheduled now, and the checkpoints that
        some of them make. A checkpoint that is copied may be given out from the next step on: the
        device has copied it by then. One that is made is offered to others once it is known to be
        ``sound``."""
        copies, self._copies = self._copies, []
        for table, slot in self._borrowed:
            table.pool.free([slot])
        self._borrowed = []
        return copies

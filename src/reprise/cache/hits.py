"""What the cache has of a request's tokens already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reprise.cache.block_pool import NULL_BLOCK
from reprise.cache.block_table import BlockTable
from reprise.cache.request_table import CacheUser
from reprise.cache.state_table import StateTable


@dataclass(frozen=True)
class Hit:
    """What the cache has of a request's tokens."""

    length: int = 0
    """In tokens, from the first one on."""
    tables: Sequence[Sequence[int]] = ()
    """Of each table the blocks of these tokens; the null block for blocks that are no longer
    needed."""
    junction: int = 0
    """So long a prefix there would be, had its states been copied; 0: it is none that is worth it.
    Others may have it, too."""
    replay: int = 0
    """How many of these tokens, the last ones, its states keep beside them: a request that goes on
    from there replays them first."""


def longest_hit(
    tables: Sequence[BlockTable | StateTable], request: CacheUser, step: int, apart: int
) -> Hit:
    """The longest prefix of the request's known tokens behind which it could go on: every table has
    the blocks that it needs there. At least one token stays uncovered.

    Args:
        tables: All that a request has.
        request: Its tokens are looked up.
        step: A prefix is as long as a multiple of it, in tokens.
        apart: By so much a prefix that states lack has to be longer, to be worth a junction.
    """
    states = [table for table in tables if isinstance(table, StateTable)]
    length = (len(request.token_ids) - 1) // step * step
    found: list[list[int]] = []
    runs: list[list[int]] = []
    for table in tables:
        blocks, lengths = table.find(request, length)
        found.append(blocks)
        runs.append(lengths)
        length = min(length, len(blocks) * table.size // step * step)

    def resumes(with_states: bool) -> bool:
        return all(
            run[length // table.size - 1] >= len(table.resumes(length))
            for table, run in zip(tables, runs, strict=True)
            if with_states or not table.lifetime.rewritten
        )

    while length and not resumes(with_states=False):
        length -= step
    junction = length
    replays: set[int] = set()
    while length:
        if resumes(with_states=True):
            replays = {
                table.replay(found[table.number][length // table.size - 1]) for table in states
            }
            if len(replays) <= 1:  # one number is told of a request
                break
        length -= step
    if junction - length < apart:
        junction = 0
    if not length:
        return Hit(junction=junction)
    needed = [table.resumes(length) for table in tables]
    owned = [
        [NULL_BLOCK] * part.start + blocks[part.start : part.stop]
        for part, blocks in zip(needed, found, strict=True)
    ]
    return Hit(length, owned, junction, max(replays, default=0))

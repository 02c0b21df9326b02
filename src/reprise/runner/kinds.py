"""What the host knows of a step that a graph could depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reprise.cache import KEPT, NULL_BLOCK
from reprise.cache.layout import TableLayout
from reprise.graphs.kinds import Facts, Ints, Kind
from reprise.runner.residues import compressed_of, place_of, places_of
from reprise.shape import StepShape

_BLOCKS = ("one", "neighbours", "some neighbours", "scattered")
_HALVES = ("lower half", "upper half", "both halves")


_REPLAYS = ("nothing", "one token", "several")
"""What a state is carried over before its step begins: tokens of the last step that count."""


def facts_of(tables: Sequence[TableLayout], num_drafts: int = 0) -> Facts:
    """The facts about steps of a model with these block tables. What is told of blocks is told of
    each table; where there are several, as if each were a request's only one."""
    blocks: list[str] = []
    halves: list[str] = []
    for each in tables:
        prefix = f"{each.lifetime}: " if len(tables) > 1 else ""
        blocks += [prefix + name for name in _BLOCKS]
        halves += [prefix + name for name in _HALVES]
    return Facts(
        step={
            "padding": ("none", "some", "half or more"),
            "requests": ("one", "several", "in every row"),
            "largest request": ("no more than half of the bucket", "most of it"),
            "decodes": ("none", "beside chunks", "alone"),
        },
        row={
            "begins": ("at the first token", "at a block", "within a block"),
            "new tokens": ("1", "to 4", "to 16", "to 64", "to 256", "to 1024", "to 4096", "more"),
            "context": (
                "to 16", "to 64", "to 256", "to 1024", "to 4096", "to 16k", "to 64k", "more",
            ),
            **{f"rows of {every}": places_of(every) for every in compressed_of(tables)},
            "blocks": blocks,
            "cache": halves,
            **({"replays": _REPLAYS} if tells_replays(tables, num_drafts) else {}),
        },
    )  # fmt: skip


def tells_replays(tables: Sequence[TableLayout], num_drafts: int) -> bool:
    """Whether steps differ in how many tokens of the last one they replay."""
    return num_drafts > 0 and any(each.lifetime.rewritten for each in tables)


def replays_of(accepted: Ints) -> Ints:
    """[R, 3] bool: of requests whose last step had so many tokens that count, which it is."""
    one_of: Ints = np.minimum(accepted, 2)[:, None] == np.arange(len(_REPLAYS))
    return one_of


def may_replay(verified: Ints) -> Ints:
    """The same where only the device knows how many count: what it may be of requests whose last
    step verified drafts, and of others."""
    return np.stack((~verified, verified, verified), axis=1)


FACTS = facts_of([TableLayout(KEPT, 16)])
"""Classes of counts and lengths are powers of four; start-up proves each at its upper end, where a
bound that a graph has wrong shows."""
NEW_TOKENS, CONTEXTS = 8, 8
_SHORTEST = 2
"""Contexts to 4**2 tokens are one class."""
_LONGEST = np.iinfo(np.int32).max


def class_of(values: Any) -> Any:
    """0 for 1, 1 for 2 to 4, 2 for 5 to 16, ...: numbers of at least 1, or arrays of them."""
    return (np.frexp(np.subtract(values, 1))[1] + 1) >> 1


def context_class(lengths: Any) -> Any:
    return np.clip(class_of(lengths) - _SHORTEST, 0, CONTEXTS - 1)


def class_bounds(starts: Ints, new: Ints) -> tuple[Ints, Ints]:
    """[R] each: between which starts, none of them 0, contexts with so many new tokens are of the
    class that these are of."""
    classes = context_class(starts + new)
    low = np.where(classes > 0, 4 ** (classes + _SHORTEST - 1) + 1, 1)
    high = np.where(classes < CONTEXTS - 1, 4 ** (classes + _SHORTEST), _LONGEST)
    return np.maximum(low - new, 1), high - new


class RowLayouts:
    """Where the blocks of each row lie, kept up to date as block tables grow.

    Args:
        max_rows: Rows of the block tables.
    """

    def __init__(self, max_rows: int) -> None:
        self._half = 0
        self._pairs = np.zeros((max_rows, 2), dtype=bool)
        """Whether a block follows its predecessor in memory, and whether one does not."""
        self._halves = np.zeros((max_rows, 2), dtype=bool)
        """Whether a block lies in the lower half of the cache, and whether one in the upper."""
        self._codes = np.zeros(max_rows, dtype=np.int64)
        self.highest = NULL_BLOCK
        """Of all blocks that were ever in a table."""

    def use_cache(self, num_blocks: int) -> None:
        """The cache has this many blocks."""
        self._half = (num_blocks + 1) // 2
        self.highest = NULL_BLOCK

    def extend(self, row: int, blocks: Sequence[int] | Ints, last: int | None) -> None:
        """The row's table gets further blocks.

        Args:
            row: Of the tables.
            blocks: What is added, at least one.
            last: The block before them; None: the table begins with them.
        """
        if last is None and len(blocks) == 1:
            block = int(blocks[0])
            upper = block >= self._half
            self._pairs[row] = False
            self._halves[row] = not upper, upper
            self._codes[row] = int(upper)
            self.highest = max(self.highest, block)
            return
        new = np.asarray(blocks)
        whole = new if last is None else np.concatenate(([last], new))
        follows = whole[1:] == whole[:-1] + 1
        lower = new < self._half
        pairs = (bool(follows.any()), not follows.all())
        halves = (bool(lower.any()), not lower.all())
        if last is None:
            self._pairs[row], self._halves[row] = pairs, halves
        else:
            self._pairs[row] |= pairs
            self._halves[row] |= halves
        self.highest = max(self.highest, int(new.max()))
        joined, apart = self._pairs[row]
        blocks_code = 1 if joined and not apart else 2 if joined else 3 if apart else 0
        in_lower, in_upper = self._halves[row]
        self._codes[row] = blocks_code * 3 + (2 if in_lower and in_upper else int(in_upper))

    def replace(self, row: int, table: Ints) -> None:
        """The row's table is this, but for the null block where blocks were given back."""
        held = table[table != NULL_BLOCK]
        if len(held):
            self.extend(row, held, None)

    def codes(self, rows: Ints) -> tuple[Ints, Ints]:
        """Values of ``blocks`` and ``cache`` of some rows."""
        return np.divmod(self._codes[rows], 3)

    def like(self, tables: Ints, lengths: Ints) -> RowLayouts:
        """Those of other tables in the same cache: [R, M], of each row the first ``lengths``, in
        which blocks that were given back come before all others."""
        other = RowLayouts(len(tables))
        other._half = self._half
        held = (np.arange(tables.shape[1]) < lengths[:, None]) & (tables != NULL_BLOCK)
        both = held[:, 1:] & held[:, :-1]
        follows = tables[:, 1:] == tables[:, :-1] + 1
        lower = tables < self._half
        for kind, (first, second) in (
            (other._pairs, (both & follows, both & ~follows)),
            (other._halves, (held & lower, held & ~lower)),
        ):
            kind[:, 0], kind[:, 1] = first.any(axis=1), second.any(axis=1)
        joined, apart = other._pairs.T
        in_lower, in_upper = other._halves.T
        blocks = np.where(joined, np.where(apart, 2, 1), np.where(apart, 3, 0))
        other._codes[:] = blocks * 3 + np.where(in_lower & in_upper, 2, in_upper)
        return other


def kind_of_step(
    counts: Ints,
    least: Ints,
    most: Ints,
    layouts: Sequence[tuple[Ints, Ints]],
    bucket: StepShape,
    block_sizes: Sequence[int],
    facts: Facts = FACTS,
    decodes: Ints | None = None,
    replays: Ints | None = None,
    compressed: Sequence[int] = (),
) -> Kind:
    """The kind of a step. Where it is not known how far a request has come, all that it may be:
    such a step is trusted if each of them is.

    Args:
        counts: [R], new tokens of each request.
        least: [R], tokens of each request before them, at least.
        most: [R], and at most.
        layouts: Of each table [R] each, values of ``blocks`` and ``cache``.
        bucket: What the step is padded to.
        block_sizes: Tokens in a block, of each table.
        facts: Of these tables.
        decodes: [R] bool: it computes its newest token and drafts; None: a request with one new
            token does.
        replays: [R, 3] bool: what each may replay, where that is told.
        compressed: Tokens of compressed rows, as the facts have them.
    """
    new = np.minimum(class_of(counts), NEW_TOKENS - 1)
    certain = least is most or bool((least == most).all())
    spread = most - least
    nothing = () if replays is None else (0,)
    rows: list[tuple[Ints, Ints | None]] = []
    """Codes [R], and which of them may be."""
    for table, ((blocks, halves), size) in enumerate(zip(layouts, block_sizes, strict=True)):
        behind = least % size
        others = blocks + table * len(_BLOCKS), halves + table * len(_HALVES), *nothing

        def code(begins: Any, start: Ints, others: tuple[Any, ...] = others) -> Any:
            end = start + counts
            places = (place_of(end, every) for every in compressed)
            return facts.code(begins, new, context_class(end), *places, *others)

        if certain:
            begins = np.where(least == 0, 0, np.where(behind == 0, 1, 2))
            rows.append((code(begins, least), None))
            continue
        if compressed:  # each number of tokens is another kind
            for further in range(int(spread.max()) + 1):
                start = least + further
                begins = np.where(start == 0, 0, np.where(start % size == 0, 1, 2))
                rows.append((code(begins, start), further <= spread))
            continue
        may_begin = (
            least == 0,
            (least > 0) & (behind == 0) | (behind + spread >= size),
            (behind > 0) | (spread > 0),
        )
        rows += [
            (code(begins, start), may)
            for begins, may in enumerate(may_begin)
            for start in (least, most)
        ]
    if replays is None:
        found = [each if may is None else each[may] for each, may in rows]
    else:
        found = [
            each[which if may is None else which & may] + number
            for each, may in rows
            for number, which in enumerate(replays.T)
        ]
    codes = found[0] if len(found) == 1 else np.concatenate(found)
    return Kind(facts_of_step(counts, bucket, counts == 1 if decodes is None else decodes), codes)


class DecodeCodes:
    """The codes of requests that decode one token, by how many they have: what :func:`kind_of_step`
    finds, looked up.

    Args:
        facts: Of the tables.
        block_sizes: Of each table.
        longest: Most tokens of a request.
        compressed: Tokens of compressed rows.
    """

    def __init__(
        self,
        facts: Facts,
        block_sizes: Sequence[int],
        longest: int,
        compressed: Sequence[int] = (),
    ) -> None:
        starts = np.arange(longest + 1)
        ones = np.ones_like(starts)
        shape = StepShape.decode(len(starts))
        nowhere = [(np.zeros_like(starts), np.zeros_like(starts))] * len(block_sizes)
        told = kind_of_step(
            ones, starts, starts, nowhere, shape, block_sizes, facts, compressed=compressed
        )
        self._codes = told.rows.reshape(len(block_sizes), -1)
        """[L, S]: of each table, of a request with so many tokens, but for where its blocks lie."""
        ends = (self._codes[:, 1:] != self._codes[:, :-1]).any(axis=0).nonzero()[0]
        next_end = np.append(ends, longest)[np.searchsorted(ends, starts)]
        self._left = next_end - starts
        """[S]: for how many tokens more the codes stay."""

    def of(self, lengths: Ints, blocks: Sequence[Ints]) -> tuple[Ints, int]:
        """The codes of such a step, and for how many further tokens of each request they stay.

        Args:
            lengths: [R], tokens before the new one; the longest counts for longer ones, which are
                computed ahead and dropped.
            blocks: [R] of each table, the code of where its blocks lie.
        """
        parts = [
            codes.take(lengths, mode="clip") + others
            for codes, others in zip(self._codes, blocks, strict=True)
        ]
        left = int(self._left.take(lengths, mode="clip").min(initial=len(self._left)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts), left


def facts_of_step(counts: Ints, bucket: StepShape, decoding: Ints) -> tuple[int, int, int, int]:
    requests = len(counts)
    if bucket.phase == "decode":
        live, size = requests, bucket.num_requests
        tokens, largest = size, 1
        decodes = 2
    else:
        live, size = int(counts.sum()), bucket.num_tokens
        tokens, largest = size, int(counts.max(initial=0))
        single = int(decoding.sum())
        # A step without requests is told as one of few chunks: it is padding all the same.
        decodes = 2 if single == requests > 0 else int(single > 0)
    padding = 0 if live == size else 1 if 2 * live > size else 2
    several = 0 if requests == 1 else 2 if requests == bucket.num_requests else 1
    return padding, several, int(2 * largest > tokens), decodes

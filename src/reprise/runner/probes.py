"""Made-up steps on which a graph is compared with eager execution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from reprise.graphs.contract import Probe
from reprise.runner.kinds import (
    CONTEXTS,
    NEW_TOKENS,
    RowLayouts,
    class_of,
    context_class,
    kind_of_step,
    replays_of,
    tells_replays,
)
from reprise.runner.placement import (
    BOTH,
    LOWER,
    NEIGHBOURS,
    SCATTERED,
    SOME_NEIGHBOURS,
    UPPER,
    Placement,
    Row,
)
from reprise.runner.probe_content import CacheContent, Caches
from reprise.runner.residues import compressed_of, shifts
from reprise.runner.step_inputs import StepInputs
from reprise.shape import StepShape

MOST_EXTRA = 3
"""Probes of an anchor that concern rows alone."""
STRATA = 64
"""Token ids of probes come from each so many-th part of the vocabulary in turn."""


class ProbeMaker:
    """Makes the inputs of probes, which between them are of all kinds that start-up can prove.

    Rows have lengths at the upper end of their class, since there a bound that a graph has wrong
    shows. They read from two runs of blocks, at the lower and the upper end of the cache; contexts
    may repeat blocks, but what a step writes is written by one row only, and read as an older token
    by none: see :class:`reprise.cache.Batch`.

    Args:
        buffers: Where the inputs go.
        caches: Get random content.
        vocab_size: Token ids are below.
        max_model_len: Length of the longest context.
        routed: The model sends rows to experts.
        chained: Decodes are those of a draft model, which may replay tokens whatever they have.
    """

    def __init__(
        self,
        buffers: StepInputs,
        caches: Caches,
        *,
        vocab_size: int,
        max_model_len: int,
        routed: bool = False,
        chained: bool = False,
    ) -> None:
        self._buffers = buffers
        self._chained = chained
        self._max_model_len = max_model_len
        self._routed = routed
        layout = self._layout = buffers.layout
        self._size = max(
            (each.block_size for each in layout.tables if not each.lifetime.rewritten), default=1
        )
        """Where a block of every table ends."""
        self._shifts = shifts(layout.tables)
        self._made: dict[int, Sequence[Row]] = {}
        self._placement = Placement(layout, max_model_len, buffers.max_requests, buffers.max_tokens)
        self._content = CacheContent(buffers, caches)
        strata = [vocab_size * part // STRATA for part in range(STRATA)]
        self._ids = np.array([0, vocab_size - 1, *strata], dtype=np.int64)

    # ---- sets of probes ------------------------------------------------------------------

    def probes(self, bucket: StepShape, anchor: bool) -> list[Probe]:
        """The most telling probe first; see :class:`reprise.graphs.contract.Computation`."""
        make = self._decode_probes if bucket.phase == "decode" else self._mixed_probes
        found = list(make(bucket, anchor))
        if self._routed:
            found[1:1] = self._alike(bucket)
        return found

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """A full bucket whose longest request has exactly ``context`` tokens."""
        most = self._most_requests(bucket)
        new = bucket.query_len if bucket.phase == "decode" else 1
        make = self._decode if bucket.phase == "decode" else Row
        rows = [make(new, max(new, context), SCATTERED, number % 2) for number in range(most)]
        if bucket.phase == "mixed":
            spare = min(bucket.num_tokens - most, context - 1)
            rows[0] = Row(1 + spare, context, SCATTERED, LOWER)
        shorter = [
            replace(each, length=max(each.new, context >> number))
            for number, each in enumerate(rows)
        ]
        return self._probe(f"context of {context}", bucket, shorter, seed=4)

    def _decode_probes(self, bucket: StepShape, anchor: bool) -> Iterator[Probe]:
        """Without padding and with some; anchors meet all rows, as many as there is time for."""
        rows = self._decode_rows(bucket.query_len)
        size, most = bucket.num_requests, self._most_requests(bucket)
        begin = 0 if anchor else size
        yield self._probe("longest context", bucket, _cycle(rows, most, 0), seed=1)
        live = min(most, size * 3 // 4)
        if 2 * live > size:
            yield self._probe("padded", bucket, _cycle(rows, live, begin + most), seed=2)
        if not anchor:
            return
        if size > 1:
            few = _cycle(rows, min(most, size // 2), begin + 2 * most)
            yield self._probe("mostly padding", bucket, few, seed=3)
        left = rows[most:]
        left = [*left[-1:], *left[:-1]]  # a request that begins first: small graphs meet few
        if most == 1:
            # What is told of one request alone no larger graph meets.
            for number, row in enumerate(self._alone(bucket.query_len)):
                yield self._probe(f"one request {number + 1}", bucket, [row], seed=20 + number)
        for number in range(min(MOST_EXTRA, -(-len(left) // most))):
            # A graph of few rows meets every other one: the larger anchors meet them all.
            some = left[number :: -(-len(left) // most)] if most > 1 else [_spread(left, number)]
            yield self._probe(f"rows {number + 2}", bucket, some[:most], seed=5 + number)

    def _mixed_probes(self, bucket: StepShape, anchor: bool) -> Iterator[Probe]:
        size = bucket.num_tokens
        begin = 0 if anchor else size
        width = 1 + self._buffers.rows.num_drafts
        decodes = self._decode_rows(width)
        room = max(1, self._most_requests(bucket) - 1)
        beside = min(room, max(size // (4 * width), int(size > width > 1)))
        prompt = [*_cycle(decodes, beside, 0), self._chunk(size - beside * width, 0)]
        yield self._probe("a prompt beside decodes", bucket, prompt, seed=1)
        live = max(1, size * 3 // 4)
        yield self._probe("a prefix hit alone, padded", bucket, [self._behind(live, begin)], seed=3)
        if size > 3:
            single = min(room, max(1, size // (8 * width)))
            third = max(1, (live - single * width) // 3)
            chunks = [self._chunk(third, 1), self._behind(third, begin), self._chunk(third, 2)]
            chunks = [*_cycle(decodes, single, begin + 7), *chunks]
            yield self._probe("chunks beside decodes, padded", bucket, chunks, seed=6)
        if bucket.num_requests < size:
            others = bucket.num_requests - 1
            drafting = others if width == 1 else min(others, (size - others - 1) // (width - 1))
            short = self._decode_rows(1)[: others - drafting]
            spare = size - drafting * width - len(short)
            every = [*_cycle(decodes, drafting, begin + 3), *short, self._chunk(spare, 3)]
            yield self._probe("every row", bucket, every, seed=7)
        if not anchor:
            return
        yield self._probe("one prompt", bucket, [self._chunk(size, 0)], seed=2)
        if size > 3:
            few = max(2, size * 3 // 8)
            halves = [self._chunk(few - few // 2, 1), self._behind(few // 2, begin + 1)]
            yield self._probe("two chunks, mostly padding", bucket, halves, seed=4)
        left = self._mixed_rows(size)
        for number in range(MOST_EXTRA - 1 - (size < 32)):
            if not left:
                break
            some, left = _fit(left, size, self._most_requests(bucket))
            yield self._probe(f"rows {number + 1}", bucket, some, seed=8 + number)

    def _alike(self, bucket: StepShape) -> Iterator[Probe]:
        """All tokens are the same and see nothing else, so that they go to the same experts.

        Before a step it is not known where it sends its rows. With random tokens an expert gets few
        of them; a graph that is right about few may be wrong about a crowd, and what requests of
        equal prompts decode is one. But as values that are alike have one mean, whichever of them
        attention sees, and rows that are alike may be swapped, such a step proves nothing else.
        """
        if bucket.num_tokens == 1:
            return
        if bucket.phase == "decode":
            new = bucket.query_len
            rows = [self._decode(new, new, NEIGHBOURS, LOWER)] * self._most_requests(bucket)
        else:
            rows = [self._chunk(bucket.num_tokens, 0)]
        yield self._probe("every token alike", bucket, rows, seed=9, alike=True)

    # ---- rows ----------------------------------------------------------------------------

    def _decode_rows(self, new: int) -> Sequence[Row]:
        """Every class of contexts with every layout, half, and place in a block."""
        # Graphs of all sizes ask.
        return self._made.get(new) or self._made.setdefault(new, self._make_decode_rows(new))

    def _make_decode_rows(self, new: int) -> Sequence[Row]:
        size, make = self._size, self._decode
        rows: list[Row] = []
        # The longest first, so that it is in every probe.
        for number, (cls, layout) in enumerate(
            itertools.product(reversed(range(CONTEXTS)), (NEIGHBOURS, SOME_NEIGHBOURS, SCATTERED))
        ):
            length = self._top(cls, number)
            if length is None:
                continue
            if (layout + 2 * cls) % 3 == 0 and length > size:
                length = (length - new) // size * size + new  # it begins a block
            else:
                length = self._within(length, len(rows))
            rows.append(make(new, max(new, length), layout, (layout + cls) % 3, number))
        short = max(new, min(size, self._max_model_len))
        rows += [make(new, short, NEIGHBOURS, half, half) for half in (LOWER, UPPER)]
        rows.append(make(new, new, NEIGHBOURS, LOWER))
        longest = max(new, self._max_model_len)
        return [make(new, longest, SCATTERED, BOTH), *rows]

    def _alone(self, new: int) -> list[Row]:
        """Contexts of every class, the shortest first, within a block and at one, as a request has
        them that decodes alone in a new cache."""
        size = self._size
        rows: list[Row] = []
        for cls in range(CONTEXTS):
            length = self._top(cls, 0)
            if length is None or length < new:
                continue
            last = length - new
            within = self._within(length, cls) - new
            for start in (within - (within % size == 0), last // size * size):
                if start > 0 and int(context_class(start + new)) == cls:
                    rows.append(self._decode(new, start + new, NEIGHBOURS, LOWER, len(rows)))
        return rows

    def _decode(self, new: int, length: int, layout: int, half: int, number: int = 0) -> Row:
        """One that verifies drafts, behind a step of which all count, one, or some. One that begins
        cannot, nor one that has too few tokens: these are chunks."""
        width = 1 + self._buffers.rows.num_drafts
        if (new < width and not self._chained) or new == length:
            return Row(new, length, layout, half)
        # Not in step with what else follows from the number.
        accepted = (width, 1, min(2, width), 1, width, 0)[(number + number // 3) % 6]
        return Row(new, length, layout, half, False, min(accepted, length - new))

    def _mixed_rows(self, limit: int) -> list[Row]:
        """Every class of new tokens with every class of contexts, small ones first."""
        size = self._size
        rows = []
        number = 0
        for new_class in range(1, NEW_TOKENS):
            new = min(4**new_class, limit, self._max_model_len)
            if int(class_of(new)) != new_class:
                break
            rows.append(Row(new, new, 1 + number % 3, number % 3))
            for cls in range(CONTEXTS):
                length = self._top(cls, number)
                number += 1
                if length is None or length < new:
                    continue
                layout = 1 + (cls + new_class) % 3
                start, accepted = length - new, 0
                if number % 2 and start >= size:
                    start = start // size * size  # as behind a prefix hit
                    accepted = self._copied(number, start)
                else:
                    start -= min(start, number % self._shifts)
                half = (cls + 2 * new_class) % 3
                rows.append(Row(new, start + new, layout, half, accepted=accepted))
        return rows

    def _top(self, cls: int, number: int) -> int | None:
        """The longest context of a class, or now and then the power of two below it; None: contexts
        are shorter."""
        top = min(4 ** (cls + 2), self._max_model_len)
        if int(context_class(top)) != cls:
            return None
        below = 2 * 4 ** (cls + 1)
        return below if number % 4 == 3 and below < top else top

    def _within(self, length: int, number: int) -> int:
        """A length up to this one: every other ends within a block, as most contexts do, neither at
        its first row nor at its last."""
        if self._shifts > 1:  # that varies it
            return length - number % self._shifts
        size = self._size
        if number % 2 == 0 or length < size or size < 3:
            return length
        return min(length, (length - 1) // size * size + 2 + number % (size - 2))

    def _chunk(self, new: int, number: int) -> Row:
        """A fresh prompt."""
        new = max(1, min(new, self._max_model_len))
        return Row(new, new, 1 + number % 3, number % 3)

    def _behind(self, new: int, number: int) -> Row:
        """A chunk behind a prefix hit, as long as can be."""
        size = self._size
        start = max(0, self._max_model_len - new) // size * size
        new = max(1, min(new, self._max_model_len - start))
        accepted = self._copied(number, start)
        return Row(new, start + new, 1 + number % 3, number % 3, accepted=accepted)

    def _copied(self, number: int, start: int) -> int:
        """Of a chunk behind a hit: tokens that its states, which were copied, have beside them."""
        width = 1 + self._buffers.rows.num_drafts
        return min(start, (width, 0, 1)[number % 3]) if width > 1 else 0

    def _most_requests(self, bucket: StepShape) -> int:
        """Live requests whose written blocks are all different."""
        most = self._placement.most_requests(bucket.query_len)
        return max(1, min(bucket.num_requests, bucket.num_tokens, most))

    # ---- one probe -----------------------------------------------------------------------

    def _probe(
        self, name: str, bucket: StepShape, rows: Sequence[Row], seed: int, alike: bool = False
    ) -> Probe:
        random = np.random.default_rng([seed, bucket.size, bucket.query_len])
        rows = self._placement.that_fit(rows, bucket.num_tokens, bucket.num_requests)
        tables = self._placement.tables(rows, random)
        counts = np.array([each.new for each in rows], dtype=np.int64)
        lengths = np.array([each.length for each in rows], dtype=np.int64)
        known = np.where([each.known for each in rows], counts, 0)
        accepted = np.array([each.accepted for each in rows], dtype=np.int64)
        tokens = int(counts.sum())
        ids = np.resize(np.roll(self._ids, -int(random.integers(len(self._ids)))), tokens)
        if bucket.num_tokens <= 2:  # few tokens meet few ids: each probe others
            ids = self._ids[(np.arange(tokens) + seed * tokens) % len(self._ids)]
        if alike:
            ids[:] = ids[0]
        live = StepShape(bucket.phase, tokens, len(rows), bucket.query_len)

        def fill() -> None:
            self._content.fill(tables)
            self._buffers.fill_rows(
                counts, lengths, tables, ids, known, accepted, padded=(live, bucket)
            )

        codes = []
        for layout, table in zip(self._layout.tables, tables, strict=True):
            layouts = RowLayouts(len(rows))
            layouts.use_cache(self._layout.pools[layout.pool].num_blocks)
            layouts = layouts.like(table, -(-lengths // layout.span))
            codes.append(layouts.codes(np.arange(len(rows))))
        sizes = [each.block_size for each in self._layout.tables]
        starts, num_drafts = lengths - counts, self._buffers.rows.num_drafts
        decodes = known == 0 if num_drafts else None
        facts = self._buffers.known.facts
        replays = None
        if tells_replays(self._layout.tables, num_drafts):
            replays = replays_of(accepted)
        kind = kind_of_step(counts, starts, starts, codes, bucket, sizes, facts, decodes, replays,
                            compressed_of(self._layout.tables))  # fmt: skip
        return Probe(name, fill, live, None if alike else kind, always=alike)


def _cycle(rows: Sequence[Row], count: int, begin: int) -> list[Row]:
    """The first row, then others from ``begin`` on in turn; when all have had theirs, short ones,
    which are there to fill the step."""
    others = rows[1:]
    turn = [others[(begin + n) % len(others)] for n in range(min(count - 1, len(others)))]
    short = min(rows, key=lambda each: each.length)
    return [rows[0], *turn, *([short] * (count - 1 - len(turn)))][:count]


def _spread(rows: Sequence[Row], number: int) -> Row:
    """One of the rows, so that a few numbers meet each attribute's values."""
    return rows[(number * 7 + number // 3) % len(rows)]


def _fit(rows: Sequence[Row], tokens: int, most: int) -> tuple[list[Row], list[Row]]:
    """Rows for one step, the first of them in any case, and those that are left."""
    taken, left = [rows[0]], []
    tokens -= rows[0].new
    for each in rows[1:]:
        if each.new <= tokens and len(taken) < most:
            taken.append(each)
            tokens -= each.new
        else:
            left.append(each)
    return taken, left

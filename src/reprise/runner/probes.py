"""Made-up steps on which a graph is compared with eager execution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.cache.memory import cache_tensors
from reprise.cache.spec import LayerCache
from reprise.graphs.contract import Probe
from reprise.graphs.kinds import Ints
from reprise.runner.arena import to_device
from reprise.runner.buffers import StepBuffers
from reprise.runner.kinds import (
    CONTEXTS,
    NEW_TOKENS,
    RowLayouts,
    class_of,
    context_class,
    kind_of_step,
)
from reprise.shape import StepShape

BANK = 64
"""Blocks of random content, repeated over all blocks of probes."""
MOST_EXTRA = 3
"""Probes of an anchor that concern rows alone."""
MIDDLE = 8
"""Blocks behind the middle of the cache to which rows write whose neighbours lie before it."""
STRATA = 64
"""Token ids of probes come from each so many-th part of the vocabulary in turn."""

NEIGHBOURS, SOME_NEIGHBOURS, SCATTERED = 1, 2, 3
LOWER, UPPER, BOTH = 0, 1, 2


@dataclass(frozen=True)
class Row:
    """One request of a probe."""

    new: int
    """Its new tokens."""
    length: int
    """All its tokens, the new ones included."""
    layout: int
    half: int


class Area:
    """A run of blocks in one half of the cache. Those that rows write are given out once each, from
    the end; those that they read may be read by many."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.next = end
        self._shuffled: Ints | None = None

    @property
    def left(self) -> int:
        return self.next - self.begin

    def take(self, count: int) -> int:
        """The first of ``count`` neighbours that no other row writes."""
        self.next -= count
        return self.next

    def scattered(self, count: int, random: np.random.Generator) -> Ints:
        """Blocks of which none follows the one before it; none if the area is empty."""
        if self._shuffled is None:
            every_other = np.arange(self.begin, self.end, 2, dtype=np.int32)
            self._shuffled = random.permutation(every_other)
        size = len(self._shuffled)
        if size == 0:
            return self._shuffled
        places = np.arange(count)
        places += int(random.integers(size))
        return self._shuffled[places % size]


class ProbeMaker:
    """Makes the inputs of probes, which between them are of all kinds that start-up can prove.

    Rows have lengths at the upper end of their class, since there a bound that a graph has wrong
    shows. They read from two runs of blocks, at the lower and the upper end of the cache; contexts
    may repeat blocks, but what a step writes is written by one row only.

    Args:
        buffers: Where the inputs go.
        caches: Those of the model, which get random content.
        vocab_size: Token ids are below.
        max_model_len: Length of the longest context.
        num_blocks: Of the cache, the null block included.
    """

    def __init__(
        self,
        buffers: StepBuffers,
        caches: Mapping[str, LayerCache],
        *,
        vocab_size: int,
        max_model_len: int,
        num_blocks: int,
    ) -> None:
        self._buffers = buffers
        self._caches = caches
        self._max_model_len = max_model_len
        self._num_blocks = num_blocks
        size = buffers.block_size
        longest = -(-max_model_len // size)
        self._half = (num_blocks + 1) // 2
        # Room for the longest context and for what a large step writes.
        most = longest + max(2 * buffers.max_requests, -(-buffers.max_tokens // size)) + 1
        self._lower_end = min(self._half, 1 + most)
        self._upper_begin = max(self._half, num_blocks - most)
        self._has_content = np.zeros(num_blocks, dtype=bool)
        strata = [vocab_size * part // STRATA for part in range(STRATA)]
        self._ids = np.array([0, vocab_size - 1, *strata], dtype=np.int64)

    # ---- sets of probes ------------------------------------------------------------------

    def probes(self, bucket: StepShape, anchor: bool) -> list[Probe]:
        """The most telling probe first; see :class:`reprise.graphs.contract.Computation`."""
        make = self._decode_probes if bucket.phase == "decode" else self._mixed_probes
        return list(make(bucket, anchor))

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """A full bucket whose longest request has exactly ``context`` tokens."""
        most = self._most_requests(bucket)
        new = bucket.query_len if bucket.phase == "decode" else 1
        rows = [Row(new, max(new, context), SCATTERED, number % 2) for number in range(most)]
        if bucket.phase == "mixed":
            spare = min(bucket.num_tokens - most, context - 1)
            rows[0] = Row(1 + spare, context, SCATTERED, LOWER)
        shorter = [Row(each.new, max(each.new, context >> number), each.layout, each.half)
                   for number, each in enumerate(rows)]  # fmt: skip
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
        for number in range(min(MOST_EXTRA, -(-len(left) // most))):
            # A graph of few rows meets every other one: the larger anchors meet them all.
            some = left[number :: -(-len(left) // most)] if most > 1 else [_spread(left, number)]
            yield self._probe(f"rows {number + 2}", bucket, some[:most], seed=5 + number)

    def _mixed_probes(self, bucket: StepShape, anchor: bool) -> Iterator[Probe]:
        size = bucket.num_tokens
        begin = 0 if anchor else size
        decodes = self._decode_rows(1)
        room = max(1, self._most_requests(bucket) - 1)
        beside = min(room, size // 4)
        prompt = [*_cycle(decodes, beside, 0), self._chunk(size - beside, 0)]
        yield self._probe("a prompt beside decodes", bucket, prompt, seed=1)
        live = max(1, size * 3 // 4)
        yield self._probe("a prefix hit alone, padded", bucket, [self._behind(live, begin)], seed=3)
        if size > 3:
            single = min(room, max(1, size // 8))
            third = max(1, (live - single) // 3)
            chunks = [self._chunk(third, 1), self._behind(third, begin), self._chunk(third, 2)]
            chunks = [*_cycle(decodes, single, begin + 7), *chunks]
            yield self._probe("chunks beside decodes, padded", bucket, chunks, seed=6)
        if bucket.num_requests < size:
            others = bucket.num_requests - 1
            every = [*_cycle(decodes, others, begin + 3), self._chunk(size - others, 3)]
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

    # ---- rows ----------------------------------------------------------------------------

    def _decode_rows(self, new: int) -> list[Row]:
        """Every class of contexts with every layout, half, and place in a block."""
        size = self._buffers.block_size
        rows = []
        # The longest first, so that it is in every probe.
        for number, (cls, layout) in enumerate(
            itertools.product(reversed(range(CONTEXTS)), (NEIGHBOURS, SOME_NEIGHBOURS, SCATTERED))
        ):
            length = self._top(cls, number)
            if length is None:
                continue
            if (layout + 2 * cls) % 3 == 0 and length > size:
                length = (length - new) // size * size + new  # it begins a block
            rows.append(Row(new, max(new, length), layout, (layout + cls) % 3))
        short = max(new, min(size, self._max_model_len))
        rows += [Row(new, short, NEIGHBOURS, half) for half in (LOWER, UPPER)]
        rows.append(Row(new, new, NEIGHBOURS, LOWER))
        longest = max(new, self._max_model_len)
        return [Row(new, longest, SCATTERED, BOTH), *rows]

    def _mixed_rows(self, limit: int) -> list[Row]:
        """Every class of new tokens with every class of contexts, small ones first."""
        size = self._buffers.block_size
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
                start = length - new
                if number % 2 and start >= size:
                    start = start // size * size  # as behind a prefix hit
                rows.append(Row(new, start + new, layout, (cls + 2 * new_class) % 3))
        return rows

    def _top(self, cls: int, number: int) -> int | None:
        """The longest context of a class, or now and then the power of two below it; None: contexts
        are shorter."""
        top = min(4 ** (cls + 2), self._max_model_len)
        if int(context_class(top)) != cls:
            return None
        below = 2 * 4 ** (cls + 1)
        return below if number % 4 == 3 and below < top else top

    def _chunk(self, new: int, number: int) -> Row:
        """A fresh prompt."""
        new = max(1, min(new, self._max_model_len))
        return Row(new, new, 1 + number % 3, number % 3)

    def _behind(self, new: int, number: int) -> Row:
        """A chunk behind a prefix hit, as long as can be."""
        size = self._buffers.block_size
        start = max(0, self._max_model_len - new) // size * size
        new = max(1, min(new, self._max_model_len - start))
        return Row(new, start + new, 1 + number % 3, number % 3)

    def _most_requests(self, bucket: StepShape) -> int:
        """Live requests whose written blocks are all different."""
        blocks = -(-max(1, bucket.query_len) // self._buffers.block_size) + 1
        most = max(1, (self._num_blocks - 1) // (2 if blocks == 2 else blocks))
        return max(1, min(bucket.num_requests, bucket.num_tokens, most))

    # ---- one probe -----------------------------------------------------------------------

    def _probe(self, name: str, bucket: StepShape, rows: Sequence[Row], seed: int) -> Probe:
        random = np.random.default_rng([seed, bucket.size, bucket.query_len])
        rows = self._that_fit(rows, bucket)
        tables = self._tables(rows, random)
        counts = np.array([each.new for each in rows], dtype=np.int64)
        lengths = np.array([each.length for each in rows], dtype=np.int64)
        layouts = RowLayouts(len(rows))
        layouts.use_cache(self._num_blocks)
        for row, table in enumerate(tables):
            layouts.extend(row, table, None)
        tokens = int(counts.sum())
        ids = np.resize(np.roll(self._ids, -int(random.integers(len(self._ids)))), tokens)
        if bucket.num_tokens <= 2:  # few tokens meet few ids: each probe others
            ids = self._ids[(np.arange(tokens) + seed * tokens) % len(self._ids)]
        width = max(map(len, tables))
        table = np.zeros((len(rows), width), dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks

        live = StepShape(bucket.phase, tokens, len(rows), bucket.query_len)

        def fill() -> None:
            self._fill_blocks(np.unique(table))
            self._buffers.fill_rows(counts, lengths, table, ids)
            self._buffers.fill_padding(live, bucket)

        kind = kind_of_step(
            counts, lengths, layouts.codes(np.arange(len(rows))), bucket, self._buffers.block_size
        )
        return Probe(name, fill, live, kind)

    def _that_fit(self, rows: Sequence[Row], bucket: StepShape) -> list[Row]:
        """As many of the rows as the bucket and the cache have room for; at least one."""
        size = self._buffers.block_size
        tokens, blocks = bucket.num_tokens, self._num_blocks - 1
        fitting: list[Row] = []
        for each in rows:
            written = (each.length - 1) // size - (each.length - each.new) // size + 1
            if written > blocks and not fitting:
                new = min(each.new, blocks * size)
                each, written = Row(new, new, each.layout, each.half), blocks
            if each.new > tokens or written > blocks or len(fitting) == bucket.num_requests:
                continue
            tokens -= each.new
            blocks -= written
            fitting.append(each)
        return fitting

    def _tables(self, rows: Sequence[Row], random: np.random.Generator) -> list[Ints]:
        """The blocks of each row; those that it writes belong to it alone."""
        areas = (Area(1, self._lower_end), Area(self._upper_begin, self._num_blocks))
        self._middle = Area(self._half, self._half + MIDDLE)
        tables: list[Ints | None] = [None] * len(rows)
        # Long ones first: neighbours need room before what they write.
        for index in sorted(range(len(rows)), key=lambda each: -rows[each].length):
            tables[index] = self._table(rows[index], areas, random)
        return [each for each in tables if each is not None]

    def _table(self, row: Row, areas: tuple[Area, Area], random: np.random.Generator) -> Ints:
        size = self._buffers.block_size
        first, last = (row.length - row.new) // size, (row.length - 1) // size
        written = last - first + 1
        middle = self._middle
        if (
            row.layout == NEIGHBOURS and row.half == BOTH
            and MIDDLE <= first <= self._half - self._lower_end
            and written <= middle.left and middle.end <= self._upper_begin
        ):  # fmt: skip
            begin = middle.take(written)
            return np.arange(begin - first, begin + written, dtype=np.int32)
        own = areas[1 if row.half == UPPER else 0]
        if own.left < written:
            own = max(areas, key=lambda each: each.left)
        if own.left < written:  # what is left lies in both
            parts, missing = [], written
            for each in areas:
                count = min(each.left, missing)
                begin = each.take(count)
                parts.append(np.arange(begin, begin + count, dtype=np.int32))
                missing -= count
            mine = np.concatenate(parts)
            return np.concatenate((np.resize(mine, first), mine)).astype(np.int32)
        begin = own.take(written)
        if first == 0 and written == 1:
            return np.array((begin,), dtype=np.int32)
        mine = np.arange(begin, begin + written, dtype=np.int32)
        if row.layout == NEIGHBOURS and begin - first >= own.begin and row.half != BOTH:
            return np.arange(begin - first, begin + written, dtype=np.int32)
        if row.layout == SCATTERED:
            mine = mine[::-1]
        other = areas[0] if own is areas[1] else areas[1]
        source = other if row.half == BOTH and other.end > other.begin else own
        read = source.scattered(first, random)
        if len(read) < first:
            read = np.resize(mine, first)
        if row.layout != SCATTERED and first > 2:
            half = min(first // 2, source.end - source.begin)
            read[:half] = np.arange(source.begin, source.begin + half)
        return np.concatenate((read, mine)).astype(np.int32)

    def _fill_blocks(self, blocks: Ints) -> None:
        """Random content for blocks that have none yet."""
        new = blocks[~self._has_content[blocks]]
        if len(new) == 0:
            return
        self._has_content[new] = True
        caches = list(cache_tensors(self._caches).values())
        device = caches[0].device
        generator = torch.Generator(device=device).manual_seed(0)
        places = to_device(new.astype(np.int64), self._buffers.platform)
        picks = places * 7 % BANK
        banks: dict[Any, Tensor] = {}
        for number, cache in enumerate(caches):
            kind = (cache.shape[1:], cache.dtype)
            if kind not in banks:
                banks[kind] = _random_rows((2 * BANK, *cache.shape[1:]), cache.dtype, generator)
            # Each cache begins at another place of the bank.
            cache[places] = banks[kind][number % BANK :][picks]


def _random_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers; where rows are not numbers but packed bytes, any bytes."""
    device = generator.device
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device=device).to(dtype)
    bounds = torch.iinfo(dtype)
    return torch.randint(
        bounds.min, bounds.max + 1, shape, generator=generator, device=device, dtype=dtype
    )


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

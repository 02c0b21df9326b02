"""What the host knows of the step in the buffers: whose it is, how far they have come, its kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reprise.cache import NULL_BLOCK, CacheLayout
from reprise.graphs.kinds import Kind
from reprise.runner.arena import Ints
from reprise.runner.kinds import (
    DecodeCodes,
    RowLayouts,
    class_bounds,
    facts_of,
    facts_of_step,
    kind_of_step,
    may_replay,
    replays_of,
    tells_replays,
)
from reprise.runner.residues import compressed_of
from reprise.runner.rows import Rows
from reprise.shape import StepShape

_NEVER = -1


class KnownStep:
    """The step that was filled last.

    Args:
        rows: Where requests stand.
        layout: Block tables and pools.
        longest: Most tokens of a request.
    """

    def __init__(self, rows: Rows, layout: CacheLayout, longest: int) -> None:
        self._rows = rows
        self.layout = layout
        self.facts = facts_of(layout.tables, rows.num_drafts)
        self._tells_replays = tells_replays(layout.tables, rows.num_drafts)
        self._sizes = [each.block_size for each in layout.tables]
        self._compressed = compressed_of(layout.tables)
        self._decode_codes: DecodeCodes | None = None
        """Of plain steps."""
        if not rows.num_drafts:
            self._decode_codes = DecodeCodes(self.facts, self._sizes, longest, self._compressed)
        nothing: Ints = np.zeros(0, dtype=np.int64)
        self._numbers: Ints | None = nothing
        """[R], rows; None: a made-up step, that says itself what rows would."""
        self._place: Ints | slice = nothing
        """The same, or what is read and written faster where they are side by side."""
        self._made_up: Sequence[Ints] = ()
        """[R, M] each, the tables of a made-up step."""
        self._new, self._moves = nothing, nothing
        """[R]: new tokens at most, and by how many the step moves its rows on at least."""
        self._least, self._most = nothing, nothing
        """[R]: tokens that are there before them."""
        self._verifies: Ints = np.zeros(0, dtype=bool)
        """[R]: the request verifies drafts."""
        self._replays: Ints | None = None
        """[R, 3] bool, what each may replay; None: that is not told."""
        self._plain = False
        """Each request decodes one token."""
        self._turn = 0
        """Counts steps."""
        self._kind: Kind | None = None
        """Of :attr:`_bucket`, up to turn :attr:`_until`."""
        self._bucket: StepShape | None = None
        self._until = _NEVER
        self._range: tuple[Ints, Ints, Ints | None] | None = None
        """[R] each: of decodes that verify drafts, :attr:`_kind` is that of all that begin at least
        and at most there; and what they replay."""
        self._asked: tuple[int, StepShape, Kind] | None = None
        """The turn in which the kind of drafts was asked last, the bucket, and the answer: a model
        that drafts computes the step once more, and asks the same."""
        self._blocks: list[Ints] | None = None
        """What the rows' blocks add to their codes, of each table."""

    def begin(self, rows: Ints, new: Ints, moves: Ints, verifies: Ints, *, plain: bool) -> None:
        """A step of other requests, or that computes something else of them.

        Args:
            rows: [R].
            new: [R], tokens that each computes, drafts included.
            moves: [R], by how many each moves on at least.
            verifies: [R] bool: it verifies drafts.
            plain: Each is one token, of a request that decodes.
        """
        self._stand_at(rows)
        self._made_up, self._new, self._moves, self._plain = (), new, moves, plain
        self._verifies = verifies
        self.tables_changed()
        self.go_on()

    def go_on(self) -> None:
        """The same step once more, from where its rows stand now; then they move on."""
        rows, place = self._rows, self._place
        self._least = self._most = rows.at_least[place].copy()
        if rows.num_drafts:
            self._most = rows.at_most[place].copy()
        if self._tells_replays:
            self._replays = may_replay(rows.verified[place])
            rows.verified[place] = self._verifies
        rows.move_on(place, self._moves, self._new)
        self._turn += 1

    def follow(self, rows: Ints, new: Ints, back: int, *, replays: bool) -> None:
        """A step of so many tokens of each row, the first ``back`` of which are computed again,
        from where the rows stand behind all that was submitted. It moves no row on.

        Args:
            rows: [R].
            new: [R].
            back: 0 or 1.
            replays: What drafts keeps states: the tokens that count of the last step are replayed.
        """
        self._stand_at(rows)
        self._made_up, self._new, self._plain = (), new, False
        self._verifies = np.ones(len(rows), dtype=bool)
        self.tables_changed()
        self.follow_again(back, replays=replays)

    def follow_again(self, back: int, *, replays: bool) -> None:
        """The step of :meth:`follow` once more, with the same rows and tables."""
        self._turn += 1
        if self._tells_replays:
            self._replays = may_replay(self._rows.verified[self._place] & replays)
        self._least = np.maximum(self._rows.at_least[self._place] - back, 0)
        self._most = np.maximum(self._rows.at_most[self._place] - back, 0)

    def _stand_at(self, rows: Ints) -> None:
        self._numbers, self._place = rows, rows
        if len(rows) and (rows == np.arange(rows[0], rows[0] + len(rows))).all():
            self._place = slice(int(rows[0]), int(rows[0]) + len(rows))

    def tables_changed(self) -> None:
        """The block table of some row has changed."""
        self._until, self._blocks, self._range, self._asked = _NEVER, None, None, None

    def make_up(
        self, new: Ints, starts: Ints, tables: Sequence[Ints], verifies: Ints,
        accepted: Ints,
    ) -> None:  # fmt: skip
        """A step without requests: [R] new tokens, [R] tokens before them, [R, M] blocks of each
        table, [R] bool whether drafts are verified, [R] tokens of the last step that count."""
        self._verifies = verifies
        self._numbers, self._made_up, self._plain = None, tables, False
        self._new, self._least, self._most = new, starts, starts
        if self._tells_replays:
            self._replays = replays_of(accepted)
        self.tables_changed()

    @property
    def num_requests(self) -> int:
        return len(self._new)

    # ---- kinds ---------------------------------------------------------------------------

    def kind(self, bucket: StepShape, device: tuple[Ints, Ints] | None = None) -> Kind:
        """The kind of the step, padded to ``bucket``.

        Args:
            bucket: A shape.
            device: [R] each, tokens of each request, the new ones included, and how many of its
                last step count, where the host does not know them and the device was asked.
        """
        if self._turn <= self._until and bucket == self._bucket:
            assert self._kind is not None
            return self._kind
        if not self._plain or self._numbers is None:
            narrow = bool(self._compressed)  # a whole class has every place of a row
            if device is not None or bucket.phase != "decode" or self._numbers is None or narrow:
                return self.told(bucket, device)
            if self._asked is None or self._asked[:2] != (self._turn, bucket):
                self._asked = self._turn, bucket, self._of_drafted(bucket)
            return self._asked[2]
        # Steps of requests that decode come one after the other: what is the same is kept.
        if self._blocks is None:
            nowhere = [0] * len(self._compressed)
            self._blocks = [
                self.facts.code(0, 0, 0, *nowhere, *each.codes(self._numbers))
                for each in self._rows.layouts
            ]
        assert self._decode_codes is not None
        codes, left = self._decode_codes.of(self._least, self._blocks)
        self._kind = Kind(facts_of_step(self._new, bucket, self._verifies), codes)
        self._bucket, self._until = bucket, self._turn + left
        return self._kind

    def _of_drafted(self, bucket: StepShape) -> Kind:
        """The kind of all steps whose contexts are of the same classes: where drafts are under way
        it is not known where a block begins, and the next steps' kind is the same."""
        least, most, replays = self._least, self._most, self._replays
        if self._range is not None and bucket == self._bucket:
            low, high, known = self._range
            inside = bool((least >= low).all() and (most <= high).all())
            if inside and (replays is None or known is None or np.array_equal(replays, known)):
                assert self._kind is not None
                return self._kind
        if not least.all():
            return self.told(bucket)
        low, high = class_bounds(least, self._new)

        def between(low: Ints, high: Ints) -> Kind:
            rows, layouts = self._numbers, self._rows.layouts
            return self._between(low, high, rows, replays, layouts, bucket)

        beyond = most > high
        if beyond.any():
            # A context of one class, or of the next one: each with the places that it has there.
            parts = (
                between(least, np.minimum(most, high)),
                between(np.where(beyond, high + 1, least), most),
            )
            return Kind(parts[0].step, np.concatenate([each.rows for each in parts]))
        self._kind = between(low, high)
        self._bucket, self._range = bucket, (low, high, replays)
        return self._kind

    def told(self, bucket: StepShape, device: tuple[Ints, Ints] | None = None) -> Kind:
        """:meth:`kind`, found anew."""
        least, most, rows = self._least, self._most, self._numbers
        replays = self._replays
        if device is not None and least is not most:
            least = most = np.maximum(device[0] - self._new, 0)
            if replays is not None:
                # A request that computes this may replay nothing, whatever counted of the last
                # step.
                certain = replays.sum(axis=1, keepdims=True) == 1
                replays = np.where(certain, replays, replays_of(device[1]))
        layouts = self._rows.layouts
        if rows is None:
            layouts = [
                each.like(table, -(-(least + self._new) // layout.span))
                for each, table, layout in zip(
                    layouts, self._made_up, self.layout.tables, strict=True
                )
            ]
            rows = np.arange(len(self._new))
        return self._between(least, most, rows, replays, layouts, bucket)

    def _between(
        self, least: Ints, most: Ints, rows: Ints | None, replays: Ints | None,
        layouts: Sequence[RowLayouts], bucket: StepShape,
    ) -> Kind:  # fmt: skip
        assert rows is not None
        blocks = [each.codes(rows) for each in layouts]
        return kind_of_step(
            self._new, least, most, blocks, bucket, self._sizes, self.facts, self._decodes, replays,
            self._compressed,
        )  # fmt: skip

    @property
    def _decodes(self) -> Ints | None:
        # Without drafts a chunk of one token is computed as a decode is.
        return self._verifies if self._rows.num_drafts else None

    # ---- blocks --------------------------------------------------------------------------

    def blocks_near(self, *, reads: bool) -> dict[str, Ints]:
        """Blocks that the step writes, those next to them, the first of each row, and the null
        block: [K] int64, ascending, of each pool by what it calls them. Some more where the host
        does not know how far requests have come.

        Args:
            reads: Those that the step reads, too.
        """
        least, ends_at = self._least, self._most + self._new
        near = [np.zeros(each.num_blocks + 1, dtype=bool) for each in self.layout.pools]
        for each in near:
            each[NULL_BLOCK] = True
        for number, layout in enumerate(self.layout.tables):
            if self._numbers is None:
                table = self._made_up[number]
            else:
                table = self._rows.host_tables[number][self._numbers]
            pool = near[layout.pool]
            needed = [
                layout.lifetime.needed(int(begin), int(end), layout.block_size)
                for begin, end in zip(least, ends_at, strict=True)
            ]
            columns = np.arange(table.shape[1])
            begins = np.array([each.start for each in needed], dtype=np.int64)[:, None]
            ends = np.array([each.stop for each in needed], dtype=np.int64)[:, None]
            pool[table[np.arange(len(needed)), begins[:, 0]]] = True
            if reads:
                pool[table[(begins <= columns) & (columns < ends)]] = True
            written = table[(columns >= (least // layout.span)[:, None]) & (columns < ends)]
            for each in (written - 1, written, written + 1):
                pool[each] = True  # -1 is the last one, which does not exist
        return {
            layout.unit: each[: layout.num_blocks].nonzero()[0]
            for layout, each in zip(self.layout.pools, near, strict=True)
        }

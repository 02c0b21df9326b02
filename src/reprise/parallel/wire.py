"""A step as bytes, and back.

A step whose requests are those of the last one, each going on as before, is a header and the new
entries of block tables, six bytes each. Both ends remember the last step and how long each row's
tables are.
"""

from __future__ import annotations

import pickle
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace

from reprise.errors import RanksError
from reprise.step import Step, TableEdit

_HEADER = struct.Struct("<BbQIIHHI")
"""Flags; drafts, -1 for as many as ever; index, decodes, tokens; released rows; entries in order,
bytes of what is pickled."""
_CONTINUES, _IN_ORDER, _RESTING = 1, 2, 4
MOST_ROWS = (1 << 16) - 1


class _Mirror:
    """What both ends know of the steps so far."""

    def __init__(self) -> None:
        self.last: Step | None = None
        self.ends: list[dict[int, int]] = []
        """Of each lifetime, how many entries each row's table has had."""

    def note(self, step: Step) -> None:
        while len(self.ends) < len(step.edits):
            self.ends.append({})
        for ends, edits in zip(self.ends, step.edits, strict=False):
            for edit in edits:
                ends[edit.row] = max(ends.get(edit.row, 0), edit.begin + len(edit.blocks))
        self.last = step

    def admit(self, step: Step) -> None:
        """Tables of new owners begin anew."""
        for ends in self.ends:
            for each in step.admitted:
                ends.pop(each.row, None)

    def end(self, lifetime: int, row: int) -> int:
        return self.ends[lifetime].get(row, 0) if lifetime < len(self.ends) else 0


class Encoder:
    """Steps to bytes, in the order in which they are computed."""

    def __init__(self) -> None:
        self._mirror = _Mirror()

    def encode(self, step: Step) -> bytes:
        """Raises a RanksError for numbers that do not fit."""
        mirror, last = self._mirror, self._mirror.last
        mirror.admit(step)
        continues = last is not None and _same_rows(step, last)
        in_order = self._in_order(step)
        rest = b""
        if step.admitted or step.copies or in_order is None:
            edits = step.edits if in_order is None else None
            rest = pickle.dumps((step.admitted, step.copies, edits, len(step.edits)), 5)
        flags = continues * _CONTINUES | (in_order is not None) * _IN_ORDER
        flags |= step.resting * _RESTING
        try:
            parts = [
                _HEADER.pack(
                    flags, -1 if step.drafting is None else step.drafting,
                    step.index, step.num_decodes, step.num_tokens, len(step.released),
                    0 if in_order is None else sum(count for _, count in in_order), len(rest),
                ),
                array("H", step.released).tobytes(),
            ]  # fmt: skip
            if not continues:
                parts += [
                    struct.pack("<H", len(step.rows)),
                    array("H", step.rows).tobytes(),
                    array("I", step.counts).tobytes(),
                    array("B", step.drafts).tobytes(),
                    array("B", map(int, step.samples)).tobytes(),
                ]
            if in_order:
                lifetimes = len(step.edits)
                if lifetimes > 1:
                    parts.append(array("H", _counts(in_order, lifetimes)).tobytes())
                pairs = [pair for edits in step.edits for pair in _pairs(edits)]
                parts.append(array("H", [row for row, _ in pairs]).tobytes())
                parts.append(array("i", [block for _, block in pairs]).tobytes())
        except (struct.error, OverflowError) as error:
            raise RanksError(
                f"step {step.index} cannot be sent to the ranks ({error}): at most {MOST_ROWS} "
                "requests compute at once where several ranks do"
            ) from error
        mirror.note(step)
        return b"".join([*parts, rest])

    def _in_order(self, step: Step) -> list[tuple[int, int]] | None:
        """Lifetimes and how many entries each gets, if each goes behind those that its row has."""
        found = []
        for lifetime, edits in enumerate(step.edits):
            ends: dict[int, int] = {}
            count = 0
            for edit in edits:
                end = ends.get(edit.row, self._mirror.end(lifetime, edit.row))
                if edit.begin != end or not edit.blocks:
                    return None
                ends[edit.row] = end + len(edit.blocks)
                count += len(edit.blocks)
            found.append((lifetime, count))
        return found


class Decoder:
    """Bytes to steps, in the order in which they were encoded."""

    def __init__(self) -> None:
        self._mirror = _Mirror()
        self._lifetimes = 1

    def decode(self, message: bytes) -> Step:
        mirror = self._mirror
        (
            flags, drafting, index, decodes, tokens, released, entries, nbytes,
        ) = _HEADER.unpack_from(message)  # fmt: skip
        content = memoryview(message)[_HEADER.size :]
        rest, content = content[len(content) - nbytes :], content[: len(content) - nbytes]
        freed, content = _take(content, "H", released)
        if flags & _CONTINUES:
            assert mirror.last is not None
            step = replace(mirror.last, index=index, released=freed, admitted=(), copies=())
        else:
            (count,), content = _take(content, "H", 1)
            rows, content = _take(content, "H", count)
            counts, content = _take(content, "I", count)
            drafts, content = _take(content, "B", count)
            samples, content = _take(content, "B", count)
            step = Step(index, rows, counts, drafts, [bool(e) for e in samples], 0, 0)
            step.released = freed
        step.num_decodes, step.num_tokens = decodes, tokens
        step.drafting = None if drafting < 0 else drafting
        step.resting = bool(flags & _RESTING)
        edits = None
        if nbytes:
            step.admitted, step.copies, edits, self._lifetimes = pickle.loads(rest)
        mirror.admit(step)
        if edits is None:
            edits = [()] * self._lifetimes
            if entries:
                edits = [list(each) for each in self._edits(content, entries)]
        step.edits = edits
        mirror.note(step)
        return step

    def _edits(self, content: memoryview, entries: int) -> Iterator[Iterator[TableEdit]]:
        counts = [entries]
        if self._lifetimes > 1:
            counts, content = _take(content, "H", self._lifetimes)
        rows, content = _take(content, "H", entries)
        blocks, _ = _take(content, "i", entries)
        begin = 0
        for lifetime, count in enumerate(counts):
            mine = slice(begin, begin + count)
            yield self._of_lifetime(lifetime, rows[mine], blocks[mine])
            begin += count

    def _of_lifetime(
        self, lifetime: int, rows: Sequence[int], blocks: Sequence[int]
    ) -> Iterator[TableEdit]:
        ends: dict[int, int] = {}
        begin = 0
        while begin < len(rows):
            end, row = begin + 1, rows[begin]
            while end < len(rows) and rows[end] == row:
                end += 1
            first = ends.get(row, self._mirror.end(lifetime, row))
            ends[row] = first + end - begin
            yield TableEdit(row, first, blocks[begin:end])
            begin = end


def _take(content: memoryview, kind: str, count: int) -> tuple[list[int], memoryview]:
    found = array(kind)
    nbytes = found.itemsize * count
    found.frombytes(content[:nbytes])
    return found.tolist(), content[nbytes:]


def _same_rows(step: Step, last: Step) -> bool:
    """Nothing but the numbers in the header and tables is new."""
    return (
        step.rows == last.rows
        and step.counts == last.counts
        and step.drafts == last.drafts
        and step.samples == last.samples
    )


def _counts(in_order: Sequence[tuple[int, int]], lifetimes: int) -> list[int]:
    found = [0] * lifetimes
    for lifetime, count in in_order:
        found[lifetime] = count
    return found


def _pairs(edits: Sequence[TableEdit]) -> Iterator[tuple[int, int]]:
    return ((edit.row, block) for edit in edits for block in edit.blocks)

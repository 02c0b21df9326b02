"""Batch invariance: where an implementation promises that bits of a row depend on that row alone,
they do, in batches of any size, order and neighbours."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from reprise.doctor.conformance import operations
from reprise.doctor.conformance.contract import Kit, Skipped, add, need
from reprise.doctor.conformance.operations import Results, _run, _short
from reprise.graphs.compare import same_bits
from reprise.ops import Op, all_ops
from reprise.ops.cases import Arguments
from reprise.ops.implementation import Implementation

SIZES = (2, 3, 5, 16, 17, 33, 64)
"""Rows of the batches that are tried, beside all of a case in disorder."""


def is_batch_invariant(kit: Kit, op: Op) -> str:
    """Compute each row alone, then in batches; compare the bits."""
    found = [
        each
        for each in op.implementations.values()
        if each.batch_invariant_on(kit.platform) and each.unusable(kit.platform) is None
    ]
    if not found:
        raise Skipped("no implementation promises it here")
    if not op.rows:
        raise Skipped("which arguments have a row for each token is not declared")
    cases = {each: operations._cases(kit, op, each) for each in operations._dtypes(kit)}
    dtypes = [each for each, some in cases.items() if some]
    for each in found:
        for dtype in dtypes:
            for number, arguments in enumerate(cases[dtype]):
                if each.refusal(**arguments) is None:
                    _Trial(kit, op, each, arguments, f"{each.name}, {dtype}, case {number}").run()
    return f"{', '.join(each.name for each in found)} in {', '.join(map(_short, dtypes))}"


class _Trial:
    """One call of an op, taken apart into its rows: tokens, or requests with theirs."""

    def __init__(
        self, kit: Kit, op: Op, implementation: Implementation, arguments: Arguments, what: str
    ) -> None:
        self.kit, self.op, self.what = kit, op, what
        self.implementation, self.arguments = implementation, arguments
        self.starts: list[int] | None = None
        """Of requests, where their tokens begin."""
        self.rows: list[int]
        """Numbers of the rows that are no padding."""
        if op.requests:
            self.starts = arguments["query_start_loc"].tolist()
            lengths = arguments["seq_lens"].tolist()
            self.rows = [n for n, length in enumerate(lengths) if length and self._tokens(n)]
        else:
            self.rows = list(range(len(arguments[op.rows[0]])))

    def run(self) -> None:
        kept = dict(self.arguments)
        alone: dict[int, Results] = {}
        for row in self.rows:
            alone[row] = self._computed([row], kept)
            kept |= {name: alone[row][name] for name in self._states()}
        chance = random.Random(self.what)
        disorder = chance.sample(self.rows, len(self.rows))
        result = self._compare(disorder, alone)
        for name in self._states():
            same = same_bits(kept[name], result[name])
            need(same, f"{self.what}: {name} has other bits behind {len(disorder)} rows at once")
        if self._states() and self.op.requests:
            return  # a request has one state: it cannot be in a batch twice
        for size in SIZES:
            self._compare([chance.choice(self.rows) for _ in range(size)], alone)

    def _compare(self, rows: Sequence[int], alone: dict[int, Results]) -> Results:
        result = self._computed(rows, self.arguments)
        for name, each in result.items():
            if name in self._states():
                continue
            begin = 0
            for place, row in enumerate(rows):
                expected = alone[row][name]
                found = each[begin : begin + len(expected)]
                begin += len(expected)
                need(
                    same_bits(expected, found),
                    f"{self.what}: {name} of row {row} has other bits as number {place} of "
                    f"{len(rows)} rows than alone",
                )
        return result

    def _computed(self, rows: Sequence[int], state: Arguments) -> Results:
        """What a call with these rows alone gives and writes."""
        named = {**self.arguments, **{name: state[name] for name in self._states()}}
        tokens = list(rows)
        if self.starts is not None:
            counts = [len(self._tokens(row)) for row in rows]
            tokens = [token for row in rows for token in self._tokens(row)]
            ends = torch.tensor([0, *counts]).cumsum(0)
            named["query_start_loc"] = ends.to(self.arguments["query_start_loc"])
            for name in self.op.requests:
                named[name] = _picked(named[name], rows)
        if isinstance(named.get("live"), Tensor):  # rows from there on would be padding
            named["live"] = torch.full_like(named["live"], len(tokens))
        for name in self.op.rows:
            named[name] = _picked(named[name], tokens)
        return _run(self.kit, self.op, self.implementation.function, named)

    def _tokens(self, request: int) -> range:
        assert self.starts is not None
        return range(self.starts[request], self.starts[request + 1])

    def _states(self) -> list[str]:
        return [name for name in self.op.written(self.arguments) if name in self.op.state]


def _picked(value: Tensor | None, places: Sequence[int]) -> Tensor | None:
    return None if value is None else value[torch.tensor(places, device=value.device)]


for _name, _op in all_ops().items():
    add(
        f"op_is_batch_invariant:{_name}",
        "ops",
        f"Bits that {_name} gives a row depend on that row alone, where that is declared.\n\n"
        "Engines with batch_invariant use such implementations only: logits and tokens of a "
        "request are to the bit what they are without the others.",
        functools.partial(is_batch_invariant, op=_op),
    )

"""Batch invariance: where an implementation promises that bits of a row depend on that row alone,
they do, in batches of any size, order and neighbours."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from reprise.doctor.conformance import operations
from reprise.doctor.conformance.contract import Kit, Skipped, add, need
from reprise.doctor.conformance.operations import Results, _run, _short
from reprise.doctor.conformance.rows import Rows
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
    """One call of an op, and calls with some of its rows."""

    def __init__(
        self, kit: Kit, op: Op, implementation: Implementation, arguments: Arguments, what: str
    ) -> None:
        self.kit, self.op, self.what = kit, op, what
        self.implementation, self.arguments = implementation, arguments
        self.rows = Rows(op, arguments)

    def run(self) -> None:
        states = self.rows.states
        kept = dict(self.arguments)
        alone: dict[int, Results] = {}
        for row in self.rows.numbers:
            alone[row] = self._computed([row], kept)
            kept |= {name: alone[row][name] for name in states}
        chance = random.Random(self.what)
        disorder = chance.sample(self.rows.numbers, len(self.rows.numbers))
        result = self._compare(disorder, alone)
        for name in states:
            same = same_bits(kept[name], result[name])
            need(same, f"{self.what}: {name} has other bits behind {len(disorder)} rows at once")
        if self.rows.once:
            return
        for size in SIZES:
            self._compare([chance.choice(self.rows.numbers) for _ in range(size)], alone)

    def _compare(self, rows: Sequence[int], alone: dict[int, Results]) -> Results:
        result = self._computed(rows, self.arguments)
        for name, each in result.items():
            if name in self.rows.states:
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
        return _run(self.kit, self.op, self.implementation, self.rows.together(rows, state))


for _name, _op in all_ops().items():
    add(
        f"op_is_batch_invariant:{_name}",
        "ops",
        f"Bits that {_name} gives a row depend on that row alone, where that is declared.\n\n"
        "Engines with batch_invariant use such implementations only: logits and tokens of a "
        "request are to the bit what they are without the others.",
        functools.partial(is_batch_invariant, op=_op),
    )

"""The kinds matrix in a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from reprise.cli.doctor.group import table
from reprise.doctor.graphs.kinds import MARKS, MEANINGS
from reprise.doctor.graphs.markup import BUCKET_OF, short
from reprise.doctor.graphs.proof import met
from reprise.doctor.graphs.report import GraphMatrix, Proof
from reprise.shape import PHASES, Phase

STYLES = {"refused": "bold white on red", "not yet met": "dim", "not used": "dim"}


def kinds_tables(matrix: GraphMatrix) -> Iterator[RenderableType]:
    """A table a phase, what it leaves out, and the legend."""
    for phase in PHASES:
        mine = [each for each in matrix.proofs if each.phase == phase]
        if not mine:
            continue
        known, unknown = met(mine)
        yield _table(phase, mine, known)
        if unknown:
            yield Text(f"  not yet met by any of these graphs: {'; '.join(unknown)}", style="dim")
    used = {each.state(fact) for each in matrix.proofs for fact in (each.facts or ("any",))}
    for state in MARKS:
        if state in used:
            yield Text(f"  {MARKS[state]} {MEANINGS[state]}", style="dim")


def _table(phase: Phase, proofs: Sequence[Proof], known: Sequence[str]) -> Table:
    heads = []
    for name, group in itertools.groupby(proofs, lambda each: each.executor):
        buckets = [short(each.bucket) for each in group]
        heads += [f"{name}\n{buckets[0]}", *(f"\n{each}" for each in buckets[1:])]
    title = f"{phase}: kinds of steps that start-up proves, by graph ({BUCKET_OF[phase]})"
    made = table(title, "fact", *heads)
    for column, head in zip(made.columns[1:], heads, strict=True):
        column.justify, column.no_wrap = "center", True
        column.min_width = max(map(len, head.split("\n")))
    for _, names in itertools.groupby(known or ("any",), lambda name: name.split(": ")[0]):
        for name in names:
            made.add_row(name, *(_mark(each, name) for each in proofs))
        made.add_section()
    made.add_row("probes matched", *(f"{each.probes}/{each.planned_probes}" for each in proofs))
    return made


def _mark(proof: Proof, fact: str) -> Text:
    state = proof.state(fact)
    return Text(MARKS[state], style=STYLES.get(state, "cyan"))

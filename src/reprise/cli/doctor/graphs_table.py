"""The graph matrix in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from reprise.cli.doctor.group import table
from reprise.cli.doctor.kinds_table import kinds_tables
from reprise.doctor.graphs.markup import BUCKET_OF, gap, milliseconds, short, size, times
from reprise.doctor.graphs.report import GraphMatrix, MatrixCell, shown
from reprise.shape import PHASES, Phase

LABEL_WIDTH, CELL_WIDTH = 28, 17
"""Columns that the labels of a row take, and the longest cell: ``✗ NO GRAPH`` or two numbers."""


def show(matrix: GraphMatrix) -> None:
    """Print a table a phase, then what is wrong, then memory."""
    console = Console()
    facts = matrix.facts
    shown = (facts.get(name, "") for name in ("model", "device_name", "dtype"))
    console.print(f"[bold]Device graphs[/] of {escape(', '.join(shown))}")
    if matrix.fault is not None:
        console.print(
            f"[yellow]fault injected:[/] {matrix.fault['name']} in {matrix.fault['op']}: "
            f"{matrix.fault['summary']}"
        )
    for phase in PHASES:
        if matrix.buckets[phase]:
            for contexts in _fitting(matrix.contexts, console.width):
                console.print(_grid(matrix, phase, contexts))
    for made in kinds_tables(matrix):
        console.print(made)
    for each in matrix.absent:
        console.print(f"[dim]{each.executor}, {each.phase}: not here: {escape(each.reason)}[/]")
    for note in matrix.notes:
        console.print(f"[dim]{escape(note)}[/]")
    console.print(f"[dim]{_memory(matrix)}[/]")
    if not matrix.ok:
        console.print(_failures(matrix))
    graphs = matrix.graphs
    if matrix.bad:
        console.print(f"[bold red]✗ {len(matrix.bad)} of {len(graphs)} cells are wrong[/]")
    if matrix.refused:
        console.print(f"[bold red]✗ start-up refuses {len(matrix.refused)} further graphs[/]")
    if matrix.ok and graphs:
        console.print(f"[bold green]✓ all {len(graphs)} cells verified[/]")


def _fitting(contexts: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    """The columns in parts, each of which a terminal of this width holds."""
    count = max(1, (width - LABEL_WIDTH) // CELL_WIDTH)
    for begin in range(0, len(contexts), count):
        yield contexts[begin : begin + count]


def _grid(matrix: GraphMatrix, phase: Phase, contexts: Sequence[int]) -> Table:
    heads = [f"{short(each)} tokens" for each in contexts]
    title = f"{phase}: replay time and speed-up over eager, by longest context"
    made = table(title, "executor", BUCKET_OF[phase], *heads)
    missing = {each.executor for each in matrix.absent if each.phase == phase}
    for executor in matrix.rows(phase):
        if executor in missing:
            continue
        for index, bucket in enumerate(matrix.buckets[phase]):
            label = shown(executor) if index == 0 else ""
            cells = [matrix.cell(executor, phase, bucket, each) for each in contexts]
            made.add_row(label, str(bucket), *(_cell(each) for each in cells))
        made.add_section()
    return made


def _cell(cell: MatrixCell | None) -> Text:
    if cell is None:
        return Text("-", style="dim")
    if cell.bad:
        return Text("✗ WRONG" if cell.captured else "✗ NO GRAPH", style="bold white on red")
    if cell.speedup is None:
        return Text(milliseconds(cell.eager_ms), style="dim")
    text = Text(milliseconds(cell.replay_ms))
    # What may be noise is no result: neither a small difference nor one that comes and goes.
    style = "dim"
    if cell.sure and not 0.95 <= cell.speedup < 1.05:
        style = "cyan" if cell.speedup > 1 else "yellow"
    return text.append(f" {times(cell.speedup)}", style=style)


def _failures(matrix: GraphMatrix) -> Table:
    made = table("What is wrong, and where it begins", "cell", "layer", "op", "tensor",
                 "difference", "reason")  # fmt: skip
    for each in matrix.failures:
        where = each.where
        layer, op, tensor = "-", "-", each.tensor or "-"
        if where is not None:
            layer = str(where.layer) if where.layer is not None else where.module or "-"
            op = f"{where.op} #{where.call}"
            if where.tensor and not where.produced:
                tensor += " (received)"
        name = Text(each.name, style="red")
        made.add_row(name, layer, op, escape(tensor), gap(each.difference), escape(each.reason))
    return made


def _memory(matrix: GraphMatrix) -> str:
    totals: dict[str, int] = {}
    for each in matrix.memory:
        totals[each.executor] = totals.get(each.executor, 0) + each.actual
    text = ", ".join(f"{name} {size(taken)}" for name, taken in totals.items()) or "none"
    predicted = [each.predicted for each in matrix.memory if each.predicted is not None]
    if predicted:
        text += f" ({size(sum(predicted))} predicted in all)"
    elif matrix.memory_note:
        text += f" ({matrix.memory_note})"
    return f"graph memory: {text}"

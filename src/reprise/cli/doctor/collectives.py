"""``reprise doctor collectives``: what sums over ranks take, and whether ranks agree."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json, table
from reprise.cli.failures import EXIT_ERROR


def collectives(
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Ranks; each has a device and a process of its own.")
    ] = 2,
    device: Annotated[str, typer.Option(help="Of the first rank; others have the next.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Time the sums of tensor_parallel_size ranks, and compare their bits across ranks.

    Exits with status 2 if ranks have different bits.
    """
    from reprise.doctor.collectives import measure

    report = measure(device, tensor_parallel_size)
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not all(each["bits_equal"] for each in report["sums"]):
        raise typer.Exit(EXIT_ERROR)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    how = f"in a graph of {report['calls']}" if report["in_graphs"] else "one after the other"
    found = table(
        f"Sums of {report['ranks']} ranks on {report['platform']} ({report['device_name']}), "
        f"{report['backend']}, {how}; the slowest rank",
        "size", "implementation", "µs", "GB/s", "bits on ranks", "differs from the backend's by",
    )  # fmt: skip
    for each in report["sums"]:
        equal = "[green]equal[/]" if each["bits_equal"] else "[red]not equal[/]"
        found.add_row(
            f"{each['bytes'] >> 10} KiB", each["implementation"], f"{each['us']:.1f}",
            f"{each['gb_per_s']:.2f}", equal, f"{each['difference']:.3g}",
        )  # fmt: skip
    console = Console()
    console.print(found)
    direct = "can" if report["reads_directly"] else "cannot"
    console.print(f"ranks {direct} read each other's memory in a kernel")
    reaches = [rank for rank, each in enumerate(report["reaches"]) if each is False]
    if reaches:
        console.print(f"rank 0's device does not reach those of ranks {reaches}")


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(app, "collectives", collectives)

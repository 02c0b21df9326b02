"""``reprise doctor ops``: every op, its implementations, and which one this device gets."""

from __future__ import annotations

from typing import Any

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json, table
from reprise.cli.fields import FieldOptions
from reprise.cli.options import ENGINE_PANELS, ENGINE_SPECIAL
from reprise.config import EngineConfig


def ops(as_json: AsJson = False, *, engine: dict[str, Any]) -> None:
    """List the ops: implementations, the chosen one, and why others cannot be used here."""
    report = inspect_ops(
        engine.get("device", "auto"),
        engine.get("ops", {}),
        batch_invariant=engine.get("batch_invariant", False),
    )
    if as_json:
        print_json(report)
    else:
        _show(report)


def inspect_ops(device: str, overrides: dict[str, str], *, batch_invariant: bool) -> dict[str, Any]:
    """The registry as one device sees it, ready for JSON.

    Raises:
        PlatformError: The device is unknown or not on this machine.
        OpError: An override names an op or implementation that does not exist or cannot run.
    """
    from reprise import ops as registry
    from reprise import platforms
    from reprise.doctor.facts import op_facts

    platform = platforms.resolve(device)
    return {
        "platform": platform.name,
        "device_name": platform.device_name,
        "ops": op_facts(registry.OpTable(platform, overrides, batch_invariant=batch_invariant)),
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    found = table(
        f"Ops on {report['platform']} ({report['device_name']})",
        "op", "implementation", "used", "in graphs", "invariant", "cannot run, or refuses",
    )  # fmt: skip
    for name, op in report["ops"].items():
        label = f"{name} [dim](break op)[/]" if op["break_op"] else name
        for implementation, facts in op["implementations"].items():
            used = "[green]yes[/]" if implementation == op["chosen"] else ""
            reason = facts["unusable"] or "; ".join(facts["refuses"])
            if facts["on_request"] and not used and not facts["unusable"]:
                reason = f"only by --op {name}={implementation}: {facts['on_request']}"
            invariant = "yes" if facts["batch_invariant"] else ""
            found.add_row(label, implementation, used, facts["graph_support"], invariant, reason)
            label = ""
        found.add_section()
    Console().print(found)


def register(app: typer.Typer) -> None:
    """Add this command."""
    options = FieldOptions(
        EngineConfig,
        names=("device", "ops", "batch_invariant"),
        panels=ENGINE_PANELS,
        special=ENGINE_SPECIAL,
    )
    command(app, "ops", ops, engine=options)

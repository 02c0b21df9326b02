"""``reprise doctor memory``: what a model needs of a device, from its config alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json, table
from reprise.cli.failures import EXIT_ERROR
from reprise.cli.fields import FieldOptions
from reprise.cli.options import ENGINE_PANELS, ENGINE_SPECIAL
from reprise.config import EngineConfig
from reprise.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from reprise.doctor.memory import MemoryReport

OPTIONS = (
    "model", "revision", "dtype", "hf_overrides",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_dtype", "num_blocks",
    "graph_mode", "graph_buckets", "speculative_config", "device", "ops",
)  # fmt: skip


def memory(
    gib: Annotated[
        float | None,
        typer.Option(
            "--memory",
            help="Memory of a device in GiB. It need not be here: --device says its kind.",
            metavar="GIB",
        ),
    ] = None,
    as_json: AsJson = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Show what a model takes of a device's memory, and how many requests it leaves room for.

    Reads the config alone: no weights are loaded and nothing is computed. Exits with status 2 if
    the model does not fit.
    """
    from reprise.bench.record import heading
    from reprise.doctor.memory import memory_report

    if gib is not None and not 0 < gib < math.inf:
        raise ConfigError(f"--memory {gib}: give the device's memory in GiB, more than 0")
    config = EngineConfig(**engine)
    nbytes = None if gib is None else int(gib * 2**30)
    facts = heading("doctor memory") if as_json else {}
    report = memory_report(config, nbytes, facts)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if report.problem is not None:
        if not as_json:
            raise CapacityError(report.problem)
        raise typer.Exit(EXIT_ERROR)


def _show(report: MemoryReport) -> None:
    from rich.console import Console

    console, facts = Console(), report.facts
    weights = table("Weights", "name", "how many", "shape", "dtype", "size")
    weights.columns[0].no_wrap = True
    for each in report.weights:
        weights.add_row(each.name, str(each.count), str(each.shape), each.dtype, _size(each.bytes))
    console.print(weights)
    longest = f"a request of {facts['max_model_len']}"
    caches = table("Caches", "lifetime", "layers", "rows", "block", "a token takes", longest)
    for part in report.caches:
        rows = "\n".join(f"{name} {each}" for name, each in part.rows.items())
        block = f"{part.block_size} tokens, {_size(part.block_bytes)}"
        token = _size(part.token_bytes)
        if part.token_bytes is None:
            block, token = _size(part.block_bytes), ""
        caches.add_row(
            part.lifetime, str(part.layers), rows, block, token, _size(part.request_bytes)
        )
    console.print(caches)
    whole = table(
        f"{facts['model']} in {facts['dtype']} on {facts['platform']}, "
        f"{_size(facts['memory_total'])}",
        "part", "size", "about",
    )  # fmt: skip
    whole.columns[1].justify = "right"
    graphs = report.graphs
    buckets = ", ".join(f"{count} {phase} buckets" for phase, count in graphs["buckets"].items())
    for name, size, about in (
        ("weights", report.weights_bytes, ""),
        ("tables by position", report.tables_bytes, f"{facts['max_model_len']} positions"),
        *((name, each, "") for name, each in report.buffers.items()),
        (
            "activations",
            report.activations_bytes,
            f"at least, of {facts['max_num_batched_tokens']} tokens",
        ),
        ("graphs", graphs["pool_bytes"], f"at least, {buckets}; {graphs['note']}")
        if buckets
        else ("graphs", 0, f"{graphs['plan']}: none"),
        ("comparisons of graphs", graphs["comparison_bytes"], "with eager execution"),
        (
            "caches",
            report.cache_bytes,
            f"{' and '.join(str(each.blocks) for each in report.pools)} blocks; "
            f"{report.cache_reason}",
        ),
    ):
        whole.add_row(name, _size(size), about)
    console.print(whole)
    if report.problem is not None:
        return
    found = table("Requests that can run at once", "tokens each", "a request takes", "requests", "")
    for column in found.columns[:3]:
        column.justify = "right"
    for capacity in report.capacities:
        limited = "" if capacity.limit == "cache" else "[dim]max_num_seqs[/]"
        found.add_row(
            str(capacity.tokens), _size(capacity.request_bytes), str(capacity.requests), limited
        )
    console.print(found)


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def register(app: typer.Typer) -> None:
    """Add this command."""
    options = FieldOptions(
        EngineConfig, names=OPTIONS, panels=ENGINE_PANELS, special=ENGINE_SPECIAL
    )
    command(app, "memory", memory, engine=options)

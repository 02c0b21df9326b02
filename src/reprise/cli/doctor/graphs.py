"""``reprise doctor graphs``: every executor at every size, proven and timed, as table or page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.doctor.group import AsJson, print_json
from reprise.cli.files import output_file
from reprise.cli.options import ONE_ENGINE, engine_options
from reprise.errors import ConfigError

if TYPE_CHECKING:
    from reprise.graphs.plan import Executor

EXIT_WRONG = 1
ENGINE_DEFAULTS = {"max_num_seqs": 64, "max_num_batched_tokens": 256}
"""Steps no larger than the default buckets."""


def graphs(
    executors: Annotated[
        str, typer.Option(help="Executors to compare, separated by commas.", metavar="NAMES")
    ] = "none,full,breakable,compiled",
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a step's longest request, separated by commas; default: a few, up to "
            "the longest that the model has.",
            metavar="LENGTHS",
        ),
    ] = None,
    fault: Annotated[
        str | None,
        typer.Option(
            help="Break an op on purpose while graphs are captured, to see what that looks like; "
            "'list' names the faults.",
            metavar="NAME[:OP]",
        ),
    ] = None,
    as_json: AsJson = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with figures to this file.", dir_okay=False, callback=output_file
        ),
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Capture, verify and time every executor at every bucket and context length.

    Exits with status 1 if a graph cannot be captured or differs from eager execution.
    """
    if fault == "list":
        _list_faults()
        return
    matrix = _measure(executors, contexts, fault, engine)
    if as_json:
        print_json(matrix.to_dict())
    else:
        from reprise.cli.doctor.graphs_table import show

        show(matrix)
    if html is not None:
        from reprise.doctor.graphs import write_page

        write_page(matrix, html)
        if not as_json:
            typer.echo(f"page written to {html}")
    if not matrix.ok:
        raise typer.Exit(EXIT_WRONG)


def _measure(
    executors: str, contexts: str | None, fault: str | None, engine: dict[str, Any]
) -> Any:
    chosen = _executors(executors)
    broken = None if fault is None else _fault(fault)
    from reprise import LLM
    from reprise.bench.record import engine_facts, heading
    from reprise.doctor.graphs import default_buckets, default_contexts, measure
    from reprise.graphs import parse_buckets
    from reprise.progress import progress
    from reprise.testing.faults import FAULTS

    needed = {} if broken is None else FAULTS[broken[0]].engine_options
    options = {**ENGINE_DEFAULTS, "skip_tokenizer_init": True, **needed, **engine}
    text = options.pop("graph_buckets", None)
    if text is not None:
        # Steps must be large enough for the buckets that were asked for.
        asked = parse_buckets(text, 1 << 20, 1 << 20)
        options["max_num_seqs"] = max(options["max_num_seqs"], *asked.decode)
        options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], *asked.mixed)
    llm = LLM(graph_mode="none", **options)
    runner = llm.engine.runner
    limits = runner.config.max_num_seqs, runner.max_tokens
    buckets = default_buckets(*limits) if text is None else parse_buckets(text, *limits)
    longest = runner.max_model_len
    lengths = default_contexts(longest) if contexts is None else _contexts(contexts, longest)
    name = engine.get("model") or "the demo model"
    facts = {**heading("doctor graphs"), **engine_facts(name, llm.engine)}
    with progress("graphs", 0) as bar:
        return measure(
            runner,
            facts,
            executors=chosen,
            buckets=buckets,
            contexts=lengths,
            fault=broken,
            progress=bar.show,
        )


def _executors(text: str) -> list[Executor]:
    from reprise.graphs.plan import EXECUTORS

    found = [each.strip() for each in text.split(",") if each.strip()]
    if not found or any(each not in EXECUTORS for each in found):
        raise ConfigError(f"--executors {text}: expected some of {','.join(EXECUTORS)}")
    return [each for each in EXECUTORS if each in found]


def _contexts(text: str, longest: int) -> list[int]:
    parts = [each.strip() for each in text.split(",") if each.strip()]
    if not parts or any(not each.isdecimal() or int(each) == 0 for each in parts):
        raise ConfigError(f"--contexts {text}: expected lengths such as 1,512,4096")
    lengths = sorted({int(each) for each in parts})
    if lengths[-1] > longest:
        raise ConfigError(
            f"--contexts {text}: the longest context here is {longest} tokens; raise "
            "--max-model-len or the cache, or leave out what is longer"
        )
    return lengths


def _fault(text: str) -> tuple[str, str]:
    from reprise import ops
    from reprise.testing.faults import FAULTS

    name, _, op = text.partition(":")
    if name not in FAULTS:
        raise ConfigError(f"--fault {text}: no such fault; known: {', '.join(FAULTS)}")
    op = op or "paged_attention"
    if op not in ops.all_ops():
        raise ConfigError(f"--fault {text}: no such op; known: {', '.join(sorted(ops.all_ops()))}")
    return name, op


def _list_faults() -> None:
    from rich.console import Console

    from reprise.cli.doctor.group import table
    from reprise.testing.faults import FAULTS

    known = table("Faults", "name", "what goes wrong")
    for name, fault in FAULTS.items():
        known.add_row(name, fault.summary)
    Console().print(known)


def register(app: typer.Typer) -> None:
    """Add this command."""
    options = engine_options(
        "graph_mode", "graph_verify", "graph_memory_profile", "tokenizer", "skip_tokenizer_init",
        "enable_prefix_caching", "seed", *ONE_ENGINE, **ENGINE_DEFAULTS,
    )  # fmt: skip
    command(app, "graphs", graphs, engine=options)

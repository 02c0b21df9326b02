"""One table of the graph executors: time of a decode step with each, on one machine in one run.

    python benchmarks/graph_modes.py
    python benchmarks/graph_modes.py --model qwen3-0.6b --dtype bfloat16 --batch-size 1,64

Each mode is a fresh process of ``reprise bench latency --graph-mode MODE``; further options are
handed on to it. Without ``--model`` the demo model runs. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import reprise

MODES = "none,full,breakable,compiled"
DEMO = Path(reprise.__file__).parent / "demo_model"


def measure(mode: str, options: list[str]) -> dict[str, Any]:
    """The record of one mode. Its log goes to standard error."""
    command = [sys.executable, "-m", "reprise", "bench", "latency", "--json"]
    done = subprocess.run(
        [*command, "--graph-mode", mode, *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def rows(records: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's rows, headings first."""
    first = next(iter(records.values()))
    sizes = [(each["batch_size"], each["input_len"]) for each in first["results"]]
    heads = [f"batch {batch}, prompt {length}" for batch, length in sizes]
    table = [["asked for", "decode, mixed", "graphs", *heads, "ready"]]
    for mode, record in records.items():
        graphs = record["graphs"]
        plan = ", ".join(graphs["plan"][phase] for phase in ("decode", "mixed"))
        refused = f", {graphs['quarantined']} refused" if graphs["quarantined"] else ""
        cells = []
        for each, base in zip(record["results"], first["results"], strict=True):
            gain = base["ms_per_step"] / each["ms_per_step"]
            cells.append(f"{each['ms_per_step']:.2f} ms ({gain:.2f}\u00d7)")
        ready = f"{record['startup_seconds']:.1f} s"
        table.append([mode, plan, f"{graphs['captured']}{refused}", *cells, ready])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", default=MODES, help="separated by commas; the first is the base")
    given, options = parser.parse_known_args()
    if "--model" not in options:
        options += ["--model", str(DEMO)]
    records = {}
    for mode in given.modes.split(","):
        print(f"{mode} ...", file=sys.stderr, flush=True)
        records[mode] = measure(mode, options)
    last = records[mode]
    versions = ", ".join(f"{name} {each}" for name, each in last["versions"].items() if each)
    print(f"{last['device_name']}; {last['dtype']}; {versions}; {last['date'][:10]}\n")
    table = rows(records)
    for number, row in enumerate(table):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print(f"|{' --- |' * len(row)}")


if __name__ == "__main__":
    main()

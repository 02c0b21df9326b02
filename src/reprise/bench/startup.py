"""From the start of a process to its first token, part by part.

Each repeat is a fresh interpreter (:mod:`reprise.bench.startup_child`), since most of a start is
paid once a process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from reprise.bench.presets import DEFAULT_MODEL, engine_arguments
from reprise.bench.record import heading
from reprise.errors import RepriseError
from reprise.progress import progress

PARTS = (
    "interpreter", "import", "platform", "config", "tokenizer", "model", "weights", "draft",
    "compile", "profile", "cache", "capture", "verify", "other", "first_token",
)  # fmt: skip
"""In the order in which they happen; ``other`` is what no part claims. Those that a version or a
configuration does not have are 0."""

KERNEL_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def startup(
    model: str | None, options: Mapping[str, Any], repeats: int = 3, cold: bool = False
) -> dict[str, Any]:
    """Measure; returns the record. Times are seconds, medians over the repeats.

    Args:
        model: As in :func:`reprise.bench.presets.engine_arguments`.
        options: Engine options.
        repeats: Processes to start.
        cold: Give each an empty kernel cache, as on a machine that never ran Reprise.

    Raises:
        RepriseError: The engine does not start.
    """
    arguments = engine_arguments(model, options)
    found = []
    with progress("startup", repeats, at_once=True) as bar:
        for _ in range(repeats):
            found.append(_start(arguments, cold))
            bar.advance()
    parts = {name: _median(each["parts"].get(name, 0.0) for each in found) for name in PARTS}
    facts = {**found[-1]["facts"], "model": model or DEFAULT_MODEL}
    facts.pop("startup_seconds")
    return {
        **heading("startup"),
        **facts,
        "repeats": repeats,
        "cold": cold,
        "parts": parts,
        "ready_seconds": _median(each["ready"] for each in found),
        "first_token_seconds": _median(each["first_token"] for each in found),
        "ready_seconds_all": [round(each["ready"], 3) for each in found],
    }


def _start(arguments: Mapping[str, Any], cold: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="reprise-cold-") as empty:
        environment = dict(os.environ)
        if cold:
            environment.update({name: os.path.join(empty, name) for name in KERNEL_CACHES})
        command = [sys.executable, "-m", "reprise.bench.startup_child", json.dumps(arguments)]
        began = time.time()
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = child.stdout.splitlines()[-1:]
    try:
        result: dict[str, Any] = json.loads(last[0])
    except (IndexError, ValueError):
        raise RepriseError(
            f"the engine's process ended with status {child.returncode} before it was ready: "
            f"{child.stderr.strip()[-2000:]}"
        ) from None
    if "error" in result:
        raise RepriseError(result["error"])
    moments = result["moments"]
    parts = {
        "interpreter": moments["alive"] - began,
        "import": moments["imported"] - moments["alive"],
        **result["spans"],
        "first_token": moments["first_token"] - moments["ready"],
    }
    loading = moments["ready"] - moments["imported"]
    parts["other"] = max(0.0, loading - sum(result["spans"].values()))
    return {
        "facts": result["facts"],
        "parts": parts,
        "ready": moments["ready"] - began,
        "first_token": moments["first_token"] - began,
    }


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)

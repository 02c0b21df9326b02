"""What every record of figures carries, so that it can be understood later."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reprise.engine import Engine


def versions() -> dict[str, str | None]:
    """Version of each package that figures depend on; None if it is not installed."""
    import torch

    import reprise

    found: dict[str, str | None] = {
        "reprise": reprise.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for name in ("triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def heading(benchmark: str, program: str = "reprise") -> dict[str, Any]:
    """The first fields of a record: what ran, and when."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([program, *sys.argv[1:]]),
    }


def engine_facts(model: str, engine: Engine) -> dict[str, Any]:
    """The fields of a record that describe the engine.

    Args:
        model: As the user named it.
        engine: After start-up.
    """
    config, runner = engine.config, engine.runner
    graphs = runner.owners.report()
    return {
        "model": model,
        "load_format": config.load_format,
        "device": str(engine.platform.device),
        "device_name": engine.platform.device_name,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "versions": versions(),
        "engine": {
            "max_model_len": engine.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": runner.max_tokens,
            "block_size": runner.block_size,
            "num_blocks": runner.num_blocks,
            "enable_prefix_caching": config.enable_prefix_caching,
            "speculative_config": dict(config.speculative_config),
            "ops": {name: each.name for name, each in sorted(runner.ops.chosen.items())},
        },
        "graphs": {
            "requested": graphs.requested,
            "plan": graphs.plan,
            "verify": graphs.verify,
            "captured": len(graphs.graphs),
            "verified": sum(each.verified for each in graphs.graphs),
            "quarantined": sum(each.quarantined is not None for each in graphs.graphs),
        },
        "startup_seconds": round(engine.startup_seconds, 3),
    }


def draft_facts(engine: Engine) -> dict[str, Any]:
    """How often drafts counted so far, if any were made."""
    stats = engine.stats().drafts
    if not stats.drafts:
        return {}
    return {
        "drafts": {
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "acceptance_length": round(stats.acceptance_length, 3),
            "acceptance_rate": round(stats.acceptance_rate, 3),
            "position_rates": [round(each, 3) for each in stats.position_rates],
        }
    }

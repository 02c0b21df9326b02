"""What the engine's process says when the live view asks: all as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reprise.config import EngineConfig
from reprise.engine import EngineStats
from reprise.graphs import GraphReport
from reprise.graphs.report import GraphInfo
from reprise.metrics import Metric
from reprise.server.facts import Emissions, metric_facts
from reprise.server.live.view import MARKS


def sample(
    config: EngineConfig,
    emissions: Emissions,
    stats: Sequence[EngineStats],
    metrics: Sequence[Sequence[Metric]],
    reports: Sequence[GraphReport],
) -> dict[str, Any]:
    """This moment. ``metrics`` is as of :func:`metric_facts`, ``caches`` and ``graphs`` are fields
    of :class:`reprise.server.live.view.CacheUse` and ``Graphs``.

    Args:
        config: Of the engines.
        emissions: Of what leaves this process.
        stats: Of each engine, like the next two.
        metrics: All of them.
        reports: On graphs.
    """
    caches = [
        {
            "engine": index,
            "lifetime": name,
            "used": used,
            "total": each.scheduler.lifetime_blocks[name],
        }
        for index, each in enumerate(stats)
        for name, used in each.scheduler.lifetime_blocks_used.items()
    ]
    return {
        "metrics": metric_facts(config, emissions, stats, metrics, reports),
        "caches": caches,
        "graphs": [_graphs(index, each) for index, each in enumerate(reports)],
    }


def _graphs(engine: int, report: GraphReport) -> dict[str, Any]:
    names = list(dict.fromkeys(name for each in report.graphs for name in each.facts))
    return {
        "engine": engine,
        "requested": report.requested,
        "plan": {str(phase): str(executor) for phase, executor in report.plan.items()},
        "verify": report.verify,
        "downgrades": [
            f"{each['phase']}: {each['got']} instead of {each['wanted']}: {each['reason']}"
            for each in report.downgrades
        ],
        "replays": report.replays,
        "eager_steps": report.eager_steps,
        "canaries": report.canaries,
        "canary_failures": report.canary_failures,
        "facts": names,
        "graphs": [_graph(each, names) for each in report.graphs],
    }


def _graph(info: GraphInfo, facts: Sequence[str]) -> dict[str, Any]:
    return {
        "name": info.name,
        "owner": info.owner,
        "phase": str(info.phase),
        "bucket": info.bucket,
        "planned": str(info.planned),
        "executor": str(info.executor),
        "proof": info.proof,
        "verified": info.verified,
        "quarantined": info.quarantined,
        "dropped": info.dropped or info.deferred,
        "replays": info.replays,
        "eager_steps": info.eager_steps,
        "canaries": info.canaries,
        "canary_every": info.canary_every,
        "probes": info.probes,
        "planned_probes": info.planned_probes,
        "marks": "".join(MARKS.get(info.facts.get(name, ""), " ") for name in facts),
    }

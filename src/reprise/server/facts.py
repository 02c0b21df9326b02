"""What HTTP processes are told about the engine, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reprise import __version__
from reprise.config import EngineConfig
from reprise.engine import EngineStats, Frontend
from reprise.engine.observations import OURS
from reprise.engine.renderer import renderer_of
from reprise.engine.structured import installed
from reprise.engine.submission import MAX_LOGPROBS
from reprise.engine.template import Renderer
from reprise.errors import RequestError
from reprise.graphs import GraphReport
from reprise.metrics import Counter, Distribution, Gauge, Histogram, Metric
from reprise.sampling_params import WHOLE_VOCABULARY
from reprise.server.tools.choice import parser_name

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
GAPS = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
]  # fmt: skip
"""Seconds; vLLM's buckets."""


class Emissions:
    """What is counted where outputs leave the engine's process."""

    def __init__(self) -> None:
        self.gaps = Distribution(GAPS)
        """Seconds between two deltas of a request."""
        self.num_failed = 0
        """Requests that ended with an error."""


def engine_facts(engine: Frontend) -> dict[str, Any]:
    """What does not change."""
    config = engine.config
    recommended = {
        name: engine.generation_config[name]
        for name in (*_SAMPLING, "max_new_tokens", "do_sample")
        if engine.generation_config.get(name) is not None
    }
    renderer = _renderer(engine.tokenizer)
    if renderer is not None:
        # Renders, for the first time: what that imports no caller is to wait for.
        renderer.content_forms("user")
    signs = "" if renderer is None else renderer.text
    limit = MAX_LOGPROBS if config.max_logprobs is None else config.max_logprobs
    return {
        "model": config.model or "demo",
        "version": __version__,
        "device": ", ".join(engine.devices),
        "dtype": str(engine.config.dtype),
        "max_model_len": engine.max_model_len,
        "max_logprobs": engine.vocab_size if limit == WHOLE_VOCABULARY else limit,
        "recommended": recommended,
        "thinks": "</think>" in signs,
        "tool_parser": parser_name(signs),
        "message_names": None if renderer is None else sorted(renderer.names),
        "structured": installed() and (engine.compiler is None or engine.compiler.usable),
        "think_ids": _ids_of(engine.tokenizer, "<think>", "</think>"),
    }


def _renderer(tokenizer: Any) -> Renderer | None:
    """Of conversations; None: the model has none."""
    if tokenizer is None:
        return None
    try:
        return renderer_of(tokenizer, None, None)
    except RequestError:
        return None


def _ids_of(tokenizer: Any, *texts: str) -> list[int | None]:
    """The token of each text, where it is one token."""
    found: list[int | None] = []
    for text in texts:
        ids = [] if tokenizer is None else tokenizer.encode(text, add_special_tokens=False)
        found.append(ids[0] if len(ids) == 1 else None)
    return found


def metric_facts(
    config: EngineConfig,
    emissions: Emissions,
    stats: Sequence[EngineStats],
    metrics: Sequence[Sequence[Metric]],
    reports: Sequence[GraphReport],
) -> list[list[Any]]:
    """All metrics of this moment: kind, name, labels, values. Those that vLLM has too bear its
    prefix, so that dashboards and autoscalers find them.

    Args:
        config: Of the engines.
        emissions: Of what leaves this process, which is counted with the first engine.
        stats: Of each engine, like the next two.
        metrics: All of them.
        reports: On graphs.
    """
    found: list[list[Any]] = []
    model = {"model_name": config.model or "demo"}
    for index, (state, own, report) in enumerate(zip(stats, metrics, reports, strict=True)):
        engine = {"engine": str(index)}
        # Of failures the engine knows a part, the readers all.
        known = [each for each in own if each.labels.get("finished_reason") != "error"]
        known.append(_cache_info(config, state))
        if index == 0:
            known.append(emissions.gaps.histogram("reprise:inter_token_latency_seconds", model))
            errors = {**model, "finished_reason": "error"}
            known.append(Counter("reprise:request_success", errors, emissions.num_failed))
        found += [_plain(each, _prefix(each), engine) for each in known]
        found += [_plain(each, "reprise:", engine) for each in _graph_metrics(model, report)]
    return found


def _prefix(metric: Metric) -> str:
    """vLLM's, unless it has no metric of this name."""
    ours = metric.name.removeprefix("reprise:").startswith(OURS)
    return "reprise:" if ours else "vllm:"


def _graph_metrics(label: dict[str, str], report: GraphReport) -> list[Metric]:
    found: list[Metric] = []
    for phase in sorted({str(each.phase) for each in report.graphs}):
        mine = [each for each in report.graphs if str(each.phase) == phase]
        labels = {**label, "phase": phase}
        counts = {
            "graph_replays": sum(each.replays for each in mine),
            "graph_canaries": sum(each.canaries for each in mine),
            "graph_unproven_steps": sum(each.eager_steps for each in mine),
        }
        found += [Counter(f"reprise:{name}", labels, count) for name, count in counts.items()]
        gauges = {
            "graphs_captured": sum(each.executor != "none" for each in mine),
            "graphs_verified": sum(each.verified for each in mine),
            "graphs_quarantined": sum(each.quarantined is not None for each in mine),
        }
        found += [Gauge(f"reprise:{name}", labels, count) for name, count in gauges.items()]
    found.append(Counter("reprise:graph_canary_failures", label, report.canary_failures))
    found.append(Counter("reprise:eager_steps", label, report.eager_steps))
    return found


def _cache_info(config: EngineConfig, stats: EngineStats) -> Metric:
    labels = {
        "model_name": config.model or "demo",
        "block_size": str(config.block_size),
        "num_gpu_blocks": str(stats.scheduler.num_blocks),
        "enable_prefix_caching": str(config.enable_prefix_caching),
    }
    return Gauge("reprise:cache_config_info", labels, 1.0)


def _plain(metric: Metric, prefix: str, engine: dict[str, str]) -> list[Any]:
    labels = {**metric.labels, **engine}
    name = prefix + metric.name.removeprefix("reprise:")
    if isinstance(metric, Histogram):
        return ["histogram", name, labels, [metric.buckets, metric.sum]]
    if isinstance(metric, Counter):
        return ["counter", name, labels, metric.value]
    assert isinstance(metric, Gauge)
    return ["gauge", name, labels, metric.value]

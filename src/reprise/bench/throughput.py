"""Output tokens a second with many requests of mixed lengths at once."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reprise.bench.bound import Bounds, ModelWork, bounds, scheduled
from reprise.bench.drive import check_fits, random_prompts, run
from reprise.bench.floor import decode_bytes, measure_floor
from reprise.bench.presets import ThroughputWork, engine_arguments
from reprise.bench.record import draft_facts, engine_facts, heading
from reprise.bench.trace import check_traceable, record_trace
from reprise.bench.where import seconds_by_kind
from reprise.engine import Engine
from reprise.llm import LLM
from reprise.progress import progress

WARM_UP_TOKENS = 8


def throughput(
    work: ThroughputWork,
    options: Mapping[str, Any],
    repeats: int = 3,
    seed: int = 0,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measure; returns the record.

    Args:
        work: The requests.
        options: Engine options.
        repeats: Runs, after a shortened one that is not counted; figures are medians.
        seed: Of the lengths and of the prompts' random tokens.
        trace: Afterwards trace steps in which as many of the requests as fit decode, into this
            file.

    Raises:
        RepriseError: The engine does not start, or the requests do not fit it.
    """
    engine = LLM(**engine_arguments(work.model, {**work.engine, **options})).engine
    inputs, outputs = lengths(work, seed)
    check_fits(engine, max(a + b for a, b in zip(inputs, outputs, strict=True)))
    if trace is not None:
        check_traceable(engine, max(inputs))
    prompts = random_prompts(inputs, engine.vocab_size, seed)
    with progress("throughput", 1 + repeats, at_once=True) as bar:
        run(engine, prompts, [min(each, WARM_UP_TOKENS) for each in outputs])
        bar.advance()
        before = engine.stats().scheduler
        runs = []
        for _ in range(repeats):
            runs.append(run(engine, prompts, outputs))
            bar.advance()
        after = engine.stats().scheduler
    seconds = statistics.median(each.seconds for each in runs)
    floor = measure_floor(engine.platform, engine.runner.dtype, decode_bytes(engine.runner.model))
    with scheduled(engine) as schedule:
        ended_at: list[float] = []

        def again() -> None:
            run(engine, prompts, outputs)
            ended_at.append(time.perf_counter())

        where = seconds_by_kind(engine, again)
    found = bounds(
        ModelWork(engine.runner.model), schedule, inputs, outputs, floor,
        width=1 + engine.config.num_drafts,
    )  # fmt: skip
    traced = {} if trace is None else {"trace": record_trace(engine, prompts, trace)}
    return {
        **heading("throughput"),
        **engine_facts(work.model, engine),
        "repeats": repeats,
        "seed": seed,
        "requests": work.num_prompts,
        "input_len_range": list(work.input_len_range),
        "output_len_range": list(work.output_len_range),
        "input_tokens": sum(inputs),
        "output_tokens": sum(outputs),
        "seconds": round(seconds, 4),
        "seconds_all": [round(each.seconds, 4) for each in runs],
        "output_tokens_per_s": round(sum(outputs) / seconds, 1),
        "total_tokens_per_s": round((sum(inputs) + sum(outputs)) / seconds, 1),
        "requests_per_s": round(work.num_prompts / seconds, 3),
        "steps": round(statistics.median(each.steps for each in runs)),
        "wait_seconds": round(statistics.median(each.wait_seconds for each in runs), 4),
        "bound": {
            **floor.as_dict(),
            "schedule_seconds": round(found.of_schedule, 9),
            "schedule_tokens_per_s": round(sum(outputs) / found.of_schedule, 1),
            "times_schedule": round(seconds / found.of_schedule, 3),
            # How much of prompts that may be cached has to be computed is not known.
            **_of_any(engine, found, sum(outputs), seconds),
            "weight_gb": round(found.work.weight_bytes / 1e9, 6),
            "cache_gb": round(found.work.cache_bytes / 1e9, 6),
            "tflop": round(found.work.operations / 1e12, 6),
        },
        "where": _where(where, schedule.tail(ended_at[-1])),
        "preemptions": after.total_preemptions - before.total_preemptions,
        "waiting": schedule.most_waiting,
        **draft_facts(engine),
        **traced,
    }


def _of_any(engine: Engine, found: Bounds, tokens: int, seconds: float) -> dict[str, float | None]:
    if engine.config.enable_prefix_caching:
        return {"any_seconds": None, "any_tokens_per_s": None, "times_any": None}
    return {
        "any_seconds": round(found.of_any, 9),
        "any_tokens_per_s": round(tokens / found.of_any, 1),
        "times_any": round(seconds / found.of_any, 3),
    }


def _where(seconds: Mapping[str, float] | None, tail: float) -> dict[str, float] | None:
    """Of one more run, seconds by what they were spent on, and how long its tail was: these lie in
    the others."""
    if seconds is None:
        return None
    return {name: round(each, 4) for name, each in {**seconds, "tail": tail}.items()}


def lengths(work: ThroughputWork, seed: int) -> tuple[list[int], list[int]]:
    """Prompt and output length of each request, uniform in the work's ranges, ends included."""
    rng = random.Random(seed)
    inputs = [rng.randint(*work.input_len_range) for _ in range(work.num_prompts)]
    outputs = [rng.randint(*work.output_len_range) for _ in range(work.num_prompts)]
    return inputs, outputs

"""How long a server's users wait: any OpenAI endpoint under a load of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reprise.bench.endpoint import Answer, Endpoint, Prompt
from reprise.bench.load import Load
from reprise.bench.record import heading
from reprise.bench.work import ServeWork, arrivals, make_prompts
from reprise.errors import RequestError
from reprise.progress import Counter as Bar
from reprise.progress import progress

Times = dict[str, list[float]]
"""Milliseconds, by the names of ``METRICS``."""


def serve(
    endpoint: Endpoint,
    work: ServeWork,
    rates: Sequence[float | None] = (None,),
    processes: int = 1,
) -> tuple[dict[str, Any], list[Times]]:
    """Measure, once for each rate; returns the record, and the times of each rate.

    Ctrl-C ends the measurement: the record then has what was measured so far, and ``interrupted``.

    Args:
        endpoint: Closed afterwards.
        work: The requests.
        rates: Requests a second; None: all at once.
        processes: That send them, where one is too slow.

    Raises:
        ConfigError: A number of ``work`` is out of range, or its data set is not valid.
        RequestError: The server is not there, or the first request fails, which is not counted.
        KeyboardInterrupt: Nothing was measured yet.
    """
    work.check(rates)
    prompts = make_prompts(work, endpoint.chat)
    return asyncio.run(_serve(endpoint, work, prompts, rates, processes))


async def _serve(
    endpoint: Endpoint,
    work: ServeWork,
    prompts: Sequence[Prompt],
    rates: Sequence[float | None],
    processes: int,
) -> tuple[dict[str, Any], list[Times]]:
    async with endpoint:
        model = await endpoint.find_model()
        first = await endpoint.ask(prompts[0])
        if first.error is not None:
            raise RequestError(f"{endpoint.base_url}{endpoint.path}: {first.kind}: {first.error}")
        results: list[dict[str, Any]] = []
        times: list[Times] = []
        interrupted = False
        with progress("bench serve", len(rates) * len(prompts), at_once=True) as bar:
            for rate in rates:
                due = arrivals(work, len(prompts), rate)
                load = Load(endpoint, prompts, due, work.max_concurrency, processes)
                answers, interrupted = await _gather(load, bar)
                if answers or not interrupted:
                    results.append({"request_rate": rate, **_of_load(load, answers, due, work)})
                    times.append(times_of(answers))
                if interrupted:
                    break
    if interrupted and not results:
        raise asyncio.CancelledError
    record = {
        **heading("serve"),
        "base_url": endpoint.base_url,
        "endpoint": endpoint.path,
        "model": model,
        "num_prompts": len(prompts),
        "dataset": None if work.dataset is None else str(work.dataset),
        "input_len_range": None if work.dataset is not None else list(work.input_len_range),
        "output_len_range": list(work.output_len_range),
        "burstiness": work.burstiness,
        "max_concurrency": work.max_concurrency,
        "seed": work.seed,
        "client_processes": processes,
        "goodput": dict(work.goodput),
        "interrupted": interrupted,
        "results": results,
    }
    return record, times


async def _gather(load: Load, bar: Bar) -> tuple[list[Answer], bool]:
    """Answers, and whether Ctrl-C came before the last one."""
    answers = []
    stream = load.answers()
    try:
        async for each in stream:
            answers.append(each)
            bar.advance()
    except asyncio.CancelledError:
        return answers, True
    finally:
        await stream.aclose()
    return answers, False


def _of_load(
    load: Load, answers: Sequence[Answer], due: Sequence[float], work: ServeWork
) -> dict[str, Any]:
    complete = len(answers) == len(due)
    end = max(each.ended for each in answers) if complete else time.perf_counter()
    seconds = end - load.began
    late = [1e3 * (each.sent - each.due) for each in answers]
    return {
        **figures(answers, seconds, work.percentiles, work.goodput),
        "unfinished": len(due) - len(answers),
        "late_ms": _spread(late, work.percentiles),
        "client_busy": round(load.busy_seconds / seconds, 3),
    }


def figures(
    answers: Sequence[Answer],
    seconds: float,
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """The figures of a load.

    Args:
        answers: To all of its requests; those that failed count as failed alone.
        seconds: From its begin to its last answer.
        percentiles: 0 to 100.
        goodput: See :attr:`ServeWork.goodput`.
    """
    done = [each for each in answers if each.error is None]
    inputs = sum(each.input_tokens for each in done)
    outputs = sum(each.output_tokens for each in done)
    good = sum(_is_good(each, goodput) for each in done)
    failures: dict[str, dict[str, Any]] = {}
    for each in answers:
        if each.kind is not None:
            failures.setdefault(each.kind, {"count": 0, "first": each.error})["count"] += 1
    return {
        "seconds": round(seconds, 4),
        "completed": len(done),
        "failed": len(answers) - len(done),
        "failures": failures,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "requests_per_s": round(len(done) / seconds, 4),
        "output_tokens_per_s": round(outputs / seconds, 2),
        "total_tokens_per_s": round((inputs + outputs) / seconds, 2),
        "goodput_requests_per_s": round(good / seconds, 4) if goodput else None,
        **{f"{name}_ms": _spread(each, percentiles) for name, each in times_of(done).items()},
    }


def times_of(answers: Sequence[Answer]) -> Times:
    """Milliseconds by metric, of the answers that did not fail."""
    done = [each for each in answers if each.error is None]
    found = {
        "ttft": [each.to_first for each in done],
        "tpot": [each.each_further for each in done if each.each_further is not None],
        "itl": [gap for each in done for gap in each.gaps],
        "e2el": [each.total for each in done],
    }
    return {name: [1e3 * each for each in values] for name, values in found.items()}


def _is_good(answer: Answer, goodput: Mapping[str, float]) -> bool:
    # Without a second token it has not been slow at it.
    took = {"ttft": answer.to_first, "tpot": answer.each_further or 0.0, "e2el": answer.total}
    return all(1e3 * took[name] <= most for name, most in goodput.items())


def _spread(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles, interpolated; None of nothing."""
    if not values:
        return None
    found = {"mean": float(np.mean(values))}
    for each, value in zip(percentiles, np.percentile(values, list(percentiles)), strict=True):
        found[f"p{each:g}"] = float(value)
    return {name: round(each, 3) for name, each in found.items()}

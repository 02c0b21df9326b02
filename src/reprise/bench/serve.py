"""How long a server's users wait: any OpenAI endpoint under a load of requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reprise.bench.endpoint import Answer, Endpoint, Prompt
from reprise.bench.record import heading
from reprise.errors import ConfigError, RequestError
from reprise.progress import Counter as Bar
from reprise.progress import progress

METRICS = ("ttft", "tpot", "itl", "e2el")
"""As vLLM calls them: time to the first token, mean time of each further one, time between chunks,
time to the end."""
Times = dict[str, list[float]]
"""Milliseconds, by the names of ``METRICS``."""
WORDS = [
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with",
    "his", "they", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but",
    "what", "all", "were", "when", "we", "there", "can", "an", "your", "which", "their", "said",
    "if", "do", "will", "each", "about", "how",
]  # fmt: skip
"""Each is one token of most vocabularies."""


@dataclass(frozen=True)
class ServeWork:
    """Which requests arrive when."""

    num_prompts: int = 200
    input_len_range: tuple[int, int] = (100, 1024)
    output_len_range: tuple[int, int] = (100, 1024)
    burstiness: float = 1.0
    """Shape of the gamma distribution of the times between arrivals: 1 is Poisson's process, less
    has more bursts."""
    max_concurrency: int | None = None
    """Requests under way; further ones wait here."""
    vocab_size: int = 256
    """Prompts of token ids are drawn below it."""
    goodput: Mapping[str, float] = field(default_factory=dict)
    """Of some of ``METRICS``, the most milliseconds that a request may take to be a good one."""
    percentiles: tuple[float, ...] = (50, 90, 99)
    seed: int = 0


def make_prompts(work: ServeWork, chat: bool) -> list[Prompt]:
    """Random ones: token ids, which are exactly so many, or for chats words."""
    draw = random.Random(work.seed)
    prompts = []
    for _ in range(work.num_prompts):
        length = draw.randint(*work.input_len_range)
        text: str | list[int]
        if chat:
            text = " ".join(draw.choices(WORDS, k=length))
        else:
            text = [draw.randrange(work.vocab_size) for _ in range(length)]
        prompts.append(Prompt(text, draw.randint(*work.output_len_range)))
    return prompts


def arrivals(work: ServeWork, rate: float | None) -> list[float]:
    """Seconds from the start at which requests arrive, the first one at once; None: all do."""
    if rate is None:
        return [0.0] * work.num_prompts
    draw, shape = random.Random(f"arrivals {work.seed}"), work.burstiness
    found = [0.0]
    while len(found) < work.num_prompts:
        found.append(found[-1] + draw.gammavariate(shape, 1 / (shape * rate)))
    return found


def serve(
    endpoint: Endpoint, work: ServeWork, rates: Sequence[float | None] = (None,)
) -> tuple[dict[str, Any], list[Times]]:
    """Measure, once for each rate; returns the record, and the times of each rate.

    Args:
        endpoint: Closed afterwards.
        work: The requests.
        rates: Requests a second; None: all at once.

    Raises:
        ConfigError: A number of ``work`` is out of range.
        RequestError: The server is not there, or the first request fails, which is not counted.
    """
    _check(work, rates)
    return asyncio.run(_serve(endpoint, work, rates))


def _check(work: ServeWork, rates: Sequence[float | None]) -> None:
    for name, value in (("burstiness", work.burstiness), *(("request_rate", r) for r in rates)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value!r} must be above 0, and finite")
    for name, most in work.goodput.items():
        if name not in METRICS or name == "itl" or not most > 0:
            known = ", ".join(each for each in METRICS if each != "itl")
            raise ConfigError(f"goodput={name}:{most:g} must be milliseconds of one of {known}")
    for each in work.percentiles:
        if not 0 <= each <= 100:
            raise ConfigError(f"percentiles={each:g} must be from 0 to 100")


async def _serve(
    endpoint: Endpoint, work: ServeWork, rates: Sequence[float | None]
) -> tuple[dict[str, Any], list[Times]]:
    prompts = make_prompts(work, endpoint.chat)
    async with endpoint:
        model = await endpoint.find_model()
        first = await endpoint.ask(prompts[0])
        if first.error is not None:
            raise RequestError(f"{endpoint.base_url}{endpoint.path}: {first.error}")
        results, times = [], []
        with progress("bench serve", len(rates) * len(prompts), at_once=True) as bar:
            for rate in rates:
                result, found = await _load(endpoint, prompts, work, rate, bar)
                results.append(result)
                times.append(found)
    record = {
        **heading("serve"),
        "base_url": endpoint.base_url,
        "endpoint": endpoint.path,
        "model": model,
        "num_prompts": work.num_prompts,
        "input_len_range": list(work.input_len_range),
        "output_len_range": list(work.output_len_range),
        "burstiness": work.burstiness,
        "max_concurrency": work.max_concurrency,
        "seed": work.seed,
        "results": results,
    }
    return record, times


async def _load(
    endpoint: Endpoint, prompts: Sequence[Prompt], work: ServeWork, rate: float | None, bar: Bar
) -> tuple[dict[str, Any], Times]:
    free = asyncio.Semaphore(work.max_concurrency or len(prompts))
    began, worked = time.perf_counter(), time.process_time()
    due = [began + each for each in arrivals(work, rate)]

    async def one(prompt: Prompt, at: float) -> Answer:
        await asyncio.sleep(at - time.perf_counter())
        async with free:
            answer = await endpoint.ask(prompt)
        bar.advance()
        return answer

    answers = await asyncio.gather(*map(one, prompts, due))
    seconds = max(each.ended for each in answers) - began
    busy = (time.process_time() - worked) / seconds
    late = [each.sent - at for each, at in zip(answers, due, strict=True)]
    result = {
        "request_rate": rate,
        **figures(answers, seconds, work.percentiles, work.goodput),
        "late_ms": _spread([1e3 * each for each in late], work.percentiles),
        "client_busy": round(busy, 3),
    }
    return result, times_of(answers)


def figures(
    answers: Sequence[Answer],
    seconds: float,
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """Of a load.

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
    failures = Counter(each.error for each in answers if each.error is not None)
    return {
        "seconds": round(seconds, 4),
        "completed": len(done),
        "failed": len(answers) - len(done),
        "failures": dict(failures.most_common(5)),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "requests_per_s": round(len(done) / seconds, 4),
        "output_tokens_per_s": round(outputs / seconds, 2),
        "total_tokens_per_s": round((inputs + outputs) / seconds, 2),
        "goodput_requests_per_s": round(good / seconds, 4) if goodput else None,
        **{f"{name}_ms": _spread(each, percentiles) for name, each in times_of(done).items()},
    }


def times_of(answers: Sequence[Answer]) -> Times:
    """Of those that did not fail."""
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

"""Runs requests of set lengths through an engine and takes the times."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from reprise.engine import CompletionGroup, Engine
from reprise.errors import ConfigError
from reprise.sampling_params import SamplingParams

_ids = itertools.count()


@dataclass(frozen=True)
class Run:
    """Times of one batch of requests, from the first one's arrival."""

    seconds: float
    """Until the last token of all."""
    steps: int
    wait_seconds: float
    """Of ``seconds``, what the host spent waiting for the device."""


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids, one prompt a length."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def check_fits(engine: Engine, total_tokens: int) -> None:
    """Raise if requests of this length, prompt and output together, would end early."""
    most = min(engine.max_model_len, engine.scheduler.cache.capacity)
    if total_tokens > most:
        raise ConfigError(
            f"the benchmark needs requests of {total_tokens} tokens and the engine holds {most}; "
            "raise max_model_len or the cache's size, or shorten the lengths"
        )


def check_served(groups: Sequence[CompletionGroup]) -> None:
    """Raise if a request has failed: nothing of it can be measured."""
    for each in groups:
        if each.error is not None:
            raise each.error


def run(engine: Engine, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> Run:
    """Generate exactly so many tokens, greedily, all requests at once."""
    waited = engine.pipeline.wait_seconds
    began = time.perf_counter()
    groups = [
        engine.add(
            f"bench-{next(_ids)}",
            prompt,
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False),
        )
        for prompt, count in zip(prompts, output_lens, strict=True)
    ]
    unfinished, steps = len(groups), 0
    while unfinished:
        unfinished -= sum(each.finished for each in engine.step())
        steps += 1
    check_served(groups)
    ended = time.perf_counter()
    while engine.has_work:
        engine.step()
    return Run(ended - began, steps, engine.pipeline.wait_seconds - waited)

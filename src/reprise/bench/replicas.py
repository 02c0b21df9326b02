"""Output tokens a second of several engines behind a router."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.bench.drive import random_prompts
from reprise.bench.presets import ThroughputWork, engine_arguments
from reprise.bench.record import heading, versions
from reprise.bench.throughput import WARM_UP_TOKENS, lengths
from reprise.engine import EngineStats
from reprise.errors import ConfigError
from reprise.llm import LLM
from reprise.progress import progress
from reprise.sampling_params import SamplingParams


def throughput(
    work: ThroughputWork, options: Mapping[str, Any], repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Measure; returns the record. Seconds are the caller's, from handing in all requests to having
    all outputs.

    Args:
        work: The requests.
        options: Engine options, ``data_parallel_size`` among them.
        repeats: Runs, after a shortened one that is not counted; figures are medians.
        seed: Of the lengths and of the prompts' random tokens.

    Raises:
        RepriseError: The engines do not start, or the requests do not fit them.
    """
    inputs, outputs = lengths(work, seed)
    with LLM(**engine_arguments(work.model, {**work.engine, **options})) as llm:
        frontend = llm.frontend
        prompts = random_prompts(inputs, frontend.vocab_size, seed)
        with progress("throughput", 1 + repeats, at_once=True) as bar:
            _run(llm, prompts, [min(each, WARM_UP_TOKENS) for each in outputs])
            bar.advance()
            before, runs = llm.stats(), []
            for _ in range(repeats):
                runs.append(_run(llm, prompts, outputs))
                bar.advance()
        after, report = llm.stats(), llm.graph_report()
    seconds, config = statistics.median(runs), frontend.config
    return {
        **heading("throughput"),
        "model": work.model,
        "load_format": config.load_format,
        "dtype": str(config.dtype),
        "device": ", ".join(frontend.devices),
        "device_name": ", ".join(frontend.devices),
        "versions": versions(),
        "data_parallel_size": config.data_parallel_size,
        "startup_seconds": round(after.startup_seconds, 3),
        "repeats": repeats,
        "seed": seed,
        "requests": work.num_prompts,
        "input_tokens": sum(inputs),
        "output_tokens": sum(outputs),
        "seconds": round(seconds, 4),
        "seconds_all": [round(each, 4) for each in runs],
        "output_tokens_per_s": round(sum(outputs) / seconds, 1),
        "total_tokens_per_s": round((sum(inputs) + sum(outputs)) / seconds, 1),
        "requests_per_s": round(work.num_prompts / seconds, 3),
        "replicas": [
            _of_one(index, device, *stats, graphs.replays)
            for index, (device, stats, graphs) in enumerate(
                zip(
                    frontend.devices,
                    zip(before.replicas, after.replicas, strict=True),
                    report.replicas,
                    strict=True,
                )
            )
        ],
    }


def _run(llm: LLM, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> float:
    """Generate exactly so many tokens, greedily, all requests at once; returns seconds."""
    began = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": each} for each in prompts],
        [
            SamplingParams(temperature=0.0, max_tokens=each, ignore_eos=True, detokenize=False)
            for each in output_lens
        ],
        use_tqdm=False,
    )
    seconds = time.perf_counter() - began
    for each, wanted in zip(outputs, output_lens, strict=True):
        count = len(each.outputs[0].token_ids)
        if count < wanted:
            raise ConfigError(
                f"a request of {len(each.prompt_token_ids)} tokens has ended after {count} of "
                f"{wanted}; raise max_model_len or the cache's size, or shorten the lengths"
            )
    return seconds


def _of_one(
    index: int, device: str, before: EngineStats, after: EngineStats, replays: int
) -> dict[str, Any]:
    early, late = before.scheduler, after.scheduler
    return {
        "replica": index,
        "device": device,
        "steps": late.total_steps - early.total_steps,
        "output_tokens": late.total_generated_tokens - early.total_generated_tokens,
        "preemptions": late.total_preemptions - early.total_preemptions,
        "replays": replays,
    }

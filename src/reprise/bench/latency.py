"""Time of one decode step, and time to first token.

The time of a step is a slope: the same requests are run with a short and with a long output, and
the difference is divided by the difference of the lengths. Prefill, admission and whatever else
happens once a request cancels out.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reprise.bench.drive import Run, check_fits, random_prompts, run
from reprise.bench.experts import count_experts_hit, uniform_hits
from reprise.bench.floor import Floor, decode_bytes, measure_floor, size, weights_of_a_token
from reprise.bench.presets import LatencyWork, engine_arguments
from reprise.bench.record import draft_facts, engine_facts, heading
from reprise.bench.trace import check_traceable, record_trace
from reprise.cache.memory import step_bytes
from reprise.engine import Engine
from reprise.errors import ConfigError
from reprise.layers import SelfAttention
from reprise.llm import LLM
from reprise.progress import Counter, progress


def latency(
    work: LatencyWork,
    options: Mapping[str, Any],
    repeats: int = 3,
    seed: int = 0,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measure; returns the record.

    Args:
        work: The requests; every batch size is run at every input length.
        options: Engine options.
        repeats: Runs of each kind, after one that is not counted; figures are medians.
        seed: Of the prompts' random tokens.
        trace: Afterwards trace the largest batch at the longest input, into this file.

    Raises:
        RepriseError: The engine does not start, or the requests do not fit it.
    """
    shapes = list(itertools.product(work.batch_sizes, work.input_lens))
    engine = LLM(**engine_arguments(work.model, {**work.engine, **options})).engine
    _check(engine, work)
    if trace is not None:
        check_traceable(engine, max(work.input_lens))
    speculation = engine.config.speculation
    step_bytes = decode_bytes(engine.runner.model)
    floor = measure_floor(engine.platform, engine.runner.dtype, step_bytes)
    with progress("latency", len(shapes) * (1 + 3 * repeats), at_once=True) as bar:
        results = [_measure(engine, work, floor, *each, repeats, seed, bar) for each in shapes]
    traced = {}
    if trace is not None:
        lengths = [max(work.input_lens)] * max(work.batch_sizes)
        prompts = random_prompts(lengths, engine.vocab_size, seed)
        traced = {"trace": record_trace(engine, prompts, trace)}
    return {
        **heading("latency"),
        **engine_facts(work.model, engine),
        "synthetic_acceptance": speculation and speculation.synthetic_acceptance,
        "repeats": repeats,
        "floor": {
            **floor.as_dict(),
            "weight_bytes": size(engine.runner.model.parameters()),
            "decode_weight_bytes": step_bytes,
            "weights_ms": _ms(step_bytes / floor.bytes_per_second),
        },
        "results": results,
        **draft_facts(engine),
        **traced,
    }


def _check(engine: Engine, work: LatencyWork) -> None:
    for batch_size in work.batch_sizes:
        _, long = work.lengths(batch_size)
        check_fits(engine, max(work.input_lens) + long)
        if batch_size > engine.config.max_num_seqs:
            raise ConfigError(
                f"batch_size={batch_size} is above max_num_seqs={engine.config.max_num_seqs}: "
                "such a batch would not run as one"
            )


def _measure(
    engine: Engine,
    work: LatencyWork,
    floor: Floor,
    batch_size: int,
    input_len: int,
    repeats: int,
    seed: int,
    bar: Counter,
) -> dict[str, Any]:
    """Takes ``1 + 3 * repeats`` runs, each counted by ``bar``."""
    short, long = work.lengths(batch_size)
    prompts = random_prompts([input_len] * batch_size, engine.vocab_size, seed)

    def timed(output_len: int) -> Run:
        result = run(engine, prompts, [output_len] * batch_size)
        bar.advance()
        return result

    timed(long)
    first = [timed(1).seconds for _ in range(repeats)]
    pairs = [(timed(short), timed(long)) for _ in range(repeats)]
    # Steps that verify drafts bring more than one token.
    counts = [max(1, b.steps - a.steps) for a, b in pairs]
    steps = [(b.seconds - a.seconds) / n for (a, b), n in zip(pairs, counts, strict=True)]
    waits = [(b.wait_seconds - a.wait_seconds) / n for (a, b), n in zip(pairs, counts, strict=True)]
    step, prefill = statistics.median(steps), statistics.median(first)
    tokens = statistics.median((long - short) / each for each in counts)
    context = input_len + (short + long) / 2
    kv_bytes = step_bytes(engine.runner.model.caches().values(), context) * batch_size
    hit = count_experts_hit(engine, prompts)
    model = engine.runner.model
    read = decode_bytes(model, uniform_hits(model, batch_size) if hit is None else hit)
    least = (read + kv_bytes) / floor.bytes_per_second
    host = statistics.median(total - wait for total, wait in zip(steps, waits, strict=True))
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_lens": [short, long],
        "ms_per_step": _ms(step),
        "ms_per_step_all": [_ms(each) for each in steps],
        # Of one request.
        "tokens_per_step": round(tokens, 3),
        "tokens_per_s": round(batch_size * tokens / step, 1),
        # Without a device of its own the host's time is all there is.
        "host_ms_per_step": _ms(host) if engine.platform.asynchronous else None,
        "floor_ms": _ms(least),
        "times_floor": round(step / least, 3),
        # Of each layer, on average; and if all were equally likely.
        "experts_hit": None if hit is None else round(hit, 2),
        "experts_hit_if_uniform": uniform_hits(engine.runner.model, batch_size),
        "first_token_ms": _ms(prefill),
        "first_token_ms_all": [_ms(each) for each in first],
        "prefill_tokens_per_s": round(batch_size * input_len / prefill, 1),
        "prefill_share_of_matmul_rate": round(
            _prefill_flops(engine, batch_size, input_len) / prefill / floor.matmul_flops_per_second,
            9,
        ),
    }


def _prefill_flops(engine: Engine, batch_size: int, input_len: int) -> float:
    """Multiplications and additions of the matrix products, attention's visible half included."""
    model = engine.runner.model
    linear = weights_of_a_token(model)
    mixers = [each for each in model.modules() if isinstance(each, SelfAttention)]
    attention = sum(each.num_heads * each.head_size for each in mixers)
    head = model.vocab_size * model.hidden_size
    per_request = 2 * linear * input_len + 2 * attention * input_len**2 + 2 * head
    return float(batch_size * per_request)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)

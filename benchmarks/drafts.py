"""What drafts gain and cost, against an engine without them in the same process.

    python benchmarks/drafts.py speed --pair 8b --batch-sizes 1,8,64
    python benchmarks/drafts.py speed --pair demo --trace demo.json.gz
    python benchmarks/drafts.py same --pair demo --dtype bfloat16
    python benchmarks/drafts.py waits --pair demo
    python benchmarks/drafts.py start --pair 8b

``speed``: tokens in a second of both, in turns, as the slope between a short and a long output, and
what the device does in a steady step. The pair ``8b`` has random weights, so each of its drafts
counts with a chance (``--acceptance``); the demo pair drafts with its own head. ``same``: where
greedy tokens of both part, by how little the two likeliest tokens there differ, and what float32
says of them. ``waits``: the calls of steady steps to the device's driver, those that wait while
results are waited for apart. ``start``: processes that start with drafts and without, and their
graphs. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import reprise
from reprise import LLM, SamplingParams
from reprise.bench import trace
from reprise.bench.drive import random_prompts, run
from reprise.bench.presets import CONFIGS, engine_arguments
from reprise.bench.startup import startup

HEAD = {"method": "eagle3", "model": str(CONFIGS / "heads" / "qwen3-8b-eagle3")}
DEMO = str(Path(reprise.__file__).parent / "demo_model")
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": ("qwen3-8b", HEAD),
    "demo": (DEMO, {"method": "eagle3", "model": f"{DEMO}/eagle3"}),
    "ngram": (DEMO, {"method": "ngram"}),
}
"""Model, and what drafts for it."""
ACCEPTANCE = 0.69
"""1 + p + p² + p³ is 2.5 tokens a step."""
STORIES = [
    "Once upon a time there was a little",
    "The old dog sat by the door and",
    "One day Lily and Tom went to",
    "In the middle of the forest stood",
    "Sam had a red ball. He liked to",
    "The moon was bright and the cat",
    "Anna wanted to bake a cake, so she",
    "A small bird lived in a tall tree",
]


def arguments(options: argparse.Namespace, drafts: dict[str, Any] | None) -> dict[str, Any]:
    """Of an engine of the pair, with drafts or without."""
    name, _ = PAIRS[options.pair]
    given = {
        "dtype": options.dtype, "device": options.device, "max_model_len": 2048,
        "kv_cache_memory_bytes": 4 << 30, **json.loads(options.options),
    }  # fmt: skip
    if drafts is not None:
        given["speculative_config"] = drafts
    return engine_arguments(name, {"skip_tokenizer_init": name != DEMO, **given})


def drafting(options: argparse.Namespace, **others: Any) -> dict[str, Any]:
    """The ``speculative_config`` of the pair."""
    name, config = PAIRS[options.pair]
    found = {**config, "num_speculative_tokens": options.k, **others}
    if name != DEMO:
        found["synthetic_acceptance"] = options.acceptance
    return found


def prompts_for(llm: LLM, pair: str, count: int) -> list[list[int]]:
    if PAIRS[pair][0] != DEMO:
        return random_prompts([128] * count, llm.engine.vocab_size, 0)
    tokenizer = llm.get_tokenizer()
    return [tokenizer.encode(STORIES[each % len(STORIES)]) for each in range(count)]


def graphs(llm: LLM) -> dict[str, Any]:
    """What computed steps so far, owner by owner."""
    report = llm.graph_report()
    found: dict[str, Any] = {
        "eager_steps": report.eager_steps, "unproven_eager": report.unproven_eager,
        "canaries": report.canaries, "canary_failures": report.canary_failures,
    }  # fmt: skip
    for each in report.graphs:
        own = found.setdefault(each.owner or "target", collections.Counter())
        own["graphs"] += each.executor != "none"
        own["wait"] += each.deferred is not None
        own["mib"] += each.bytes / 2**20
        own["replays"] += each.replays
        own["eager"] += each.eager_steps
        own["verified"] += each.verified
    found["memory_mib"] = round((report.memory.actual or 0) / 2**20, 1)
    found["predicted_mib"] = round((report.memory.predicted or 0) / 2**20, 1)
    found["capture_s"] = round(report.capture_seconds, 2)
    found["verify_s"] = round(report.verify_seconds, 2)
    return found


def told(**record: Any) -> None:
    print(json.dumps(record), flush=True)


# ---- parts -----------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    plain = LLM(**arguments(options, None))
    levels = {"num_speculative_tokens_per_batch_size": "auto"} if options.auto else {}
    drafted = LLM(**arguments(options, drafting(options, **levels)))
    both = {"none": plain, "drafts": drafted}
    told(
        part="start",
        **{name: graphs(each) for name, each in both.items()},
        seconds={name: round(each.engine.startup_seconds, 2) for name, each in both.items()},
    )
    short, long = options.lengths
    for size in options.batch_sizes:
        prompts = prompts_for(plain, options.pair, size)
        for each in both.values():
            for _ in range(2):
                run(each.engine, prompts, [long] * size)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in both}
        for _ in range(options.repeats):
            for name, each in both.items():
                a, b = (run(each.engine, prompts, [count] * size) for count in (short, long))
                steps = max(1, b.steps - a.steps)
                seconds = b.seconds - a.seconds
                host = seconds - (b.wait_seconds - a.wait_seconds)
                found[name].append((
                    size * (long - short) / seconds, seconds / steps * 1e3, host / steps * 1e3
                ))  # fmt: skip
        middle = {
            name: [round(statistics.median(column), 3) for column in zip(*rows, strict=True)]
            for name, rows in found.items()
        }
        told(
            part="speed", pair=options.pair, batch_size=size, k=options.k,
            tokens_per_s_ms_per_step_host_ms=middle,
            ratio=round(middle["drafts"][0] / middle["none"][0], 3),
            acceptance_length=round(drafted.stats().drafts.acceptance_length, 3),
            drafts=graphs(drafted), none=graphs(plain),
        )  # fmt: skip
    if options.trace:
        for name, each in both.items():
            prompts = prompts_for(plain, options.pair, options.batch_sizes[0])
            path = Path(options.trace)
            figures = trace.record_trace(
                each.engine, prompts, path.with_name(f"{name}-{path.name}")
            )
            told(part="trace", engine=name, **figures)


def same(options: argparse.Namespace) -> None:
    """Where tokens part, and how far the two likeliest are from each other there."""
    params = SamplingParams(
        temperature=0.0, max_tokens=options.tokens, ignore_eos=True, logprobs=2, detokenize=False
    )
    plain = LLM(**arguments(options, None))
    texts = prompts_for(plain, options.pair, 8)
    prompts: list[Any] = [{"prompt_token_ids": each} for each in texts]
    right = [each.outputs[0] for each in plain.generate(prompts, params, use_tqdm=False)]
    gaps = [[_gap(at) for at in each.logprobs] for each in right]
    told(
        part="same",
        texts=len(prompts),
        tokens=options.tokens,
        dtype=options.dtype,
        gaps_at_percentiles={share: round(_percentile(gaps, share), 5) for share in (1, 5, 50)},
    )
    exact = None
    if options.dtype != "float32":
        exact = LLM(**{**arguments(options, None), "dtype": "float32"})
    for count in options.drafted:
        config = drafting(options, num_speculative_tokens=count)
        llm = LLM(**arguments(options, config))
        got = [each.outputs[0] for each in llm.generate(prompts, params, use_tqdm=False)]
        parted = []
        for text, before, a, b in zip(texts, gaps, right, got, strict=True):
            pairs = enumerate(zip(a.token_ids, b.token_ids, strict=True))
            where = next((number for number, (x, y) in pairs if x != y), None)
            if where is None:
                continue
            found = {"token": where, "gap": before[where]}
            if exact is not None:  # what float32 says of both
                one = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, detokenize=False)
                prompt: Any = {"prompt_token_ids": [*text, *a.token_ids[:where]]}
                (out,) = exact.generate([prompt], one, use_tqdm=False)[0].outputs
                at = out.logprobs[0]
                both = [at[e.token_ids[where]].logprob if e.token_ids[where] in at else None
                        for e in (a, b)]  # fmt: skip
                found["float32"] = both
            parted.append(found)
        told(part="same", pair=options.pair, dtype=options.dtype, k=count, parted=parted,
             acceptance_length=round(llm.stats().drafts.acceptance_length, 3),
             drafts=graphs(llm))  # fmt: skip


def _gap(at: Any) -> float:
    """Between the two likeliest tokens, of log probabilities."""
    first, second = sorted((each.logprob for each in at.values()), reverse=True)[:2]
    return round(first - second, 5)


def _percentile(gaps: list[list[float]], share: int) -> float:
    flat = sorted(each for row in gaps for each in row)
    return flat[len(flat) * share // 100]


def waits(options: argparse.Namespace) -> None:
    """The device's calls that wait, by whether results are waited for."""
    llm = LLM(**arguments(options, drafting(options)))
    engine = llm.engine
    prompts = prompts_for(llm, options.pair, options.batch_sizes[0])
    run(engine, prompts, [400] * len(prompts))
    activities = {ProfilerActivity.CPU, *trace.device_activities()}
    with trace._decoding(engine, prompts), trace._named_spans():
        trace._advance(engine, 30)
        with torch.profiler.profile(activities=activities) as recorded:
            for _ in range(trace.STEPS):
                engine.step()
    events = [each for each in trace.exported_events(recorded) if each.get("ph") == "X"]
    spans = [(each["ts"], each["ts"] + each["dur"]) for each in events if each["name"] == "wait"]
    calls: collections.Counter[str] = collections.Counter()
    host: collections.Counter[str] = collections.Counter()
    for each in events:
        if each.get("cat") in ("cuda_runtime", "cuda_driver"):
            inside = any(begin <= each["ts"] <= end for begin, end in spans)
            calls[f"{each['name']}{' while results are waited for' * inside}"] += 1
        if each["name"] in {name for *_, name in trace.HOST_PHASES}:
            host[each["name"]] += each["dur"] / trace.STEPS
    told(part="waits", pair=options.pair, steps=trace.STEPS, calls=calls,
         host_us_per_step={name: round(each, 1) for name, each in host.items()},
         device=trace.device_figures(events, trace.STEPS))  # fmt: skip


def start(options: argparse.Namespace) -> None:
    """In turns; and what the graphs hold once all are captured that a start leaves for later."""
    configs = {"none": None, "drafts": drafting(options)}
    for _ in range(options.repeats):
        for name, config in configs.items():
            given = arguments(options, config)
            record = startup(given.pop("model"), given, 1)
            told(part="start", pair=options.pair, engine=name, ready=record["ready_seconds"],
                 parts=record["parts"])  # fmt: skip
    engines = {name: LLM(**arguments(options, each)).engine for name, each in configs.items()}
    for name, engine in engines.items():
        platform, owners = engine.platform, engine.runner.owners
        platform.empty_cache()
        free, later = platform.memory_info().free, 0
        while any(each.captures.deferred for _, each in owners):
            engine.runner.prove_more()
            later += 1
        platform.synchronize()
        platform.empty_cache()
        told(part="memory", pair=options.pair, engine=name, graphs=owners.num_graphs,
             start_mib=round((owners.report().memory.actual or 0) / 2**20, 1), captured_later=later,
             later_mib=round((free - platform.memory_info().free) / 2**20, 1))  # fmt: skip


PARTS = {"speed": speed, "same": same, "waits": waits, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--pair", choices=PAIRS, default="demo")
    parser.add_argument("-k", type=int, default=3, help="tokens that are drafted")
    parser.add_argument("--auto", action="store_true", help="as many as pay")
    parser.add_argument("--acceptance", type=float, default=ACCEPTANCE)
    parser.add_argument("--batch-sizes", type=lambda text: [int(e) for e in text.split(",")],
                        default=[1])  # fmt: skip
    parser.add_argument("--lengths", type=lambda text: tuple(int(e) for e in text.split(",")),
                        default=(32, 544))  # fmt: skip
    parser.add_argument("--drafted", type=lambda text: [int(e) for e in text.split(",")],
                        default=[1, 3, 5], help="of same: each number of drafts")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--options", default="{}", help="engine options, as JSON")
    parser.add_argument("--trace", help="a file for what a steady step does")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    PARTS[options.part](options)


if __name__ == "__main__":
    main()

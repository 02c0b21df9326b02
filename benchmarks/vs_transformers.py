"""Reprise against ``transformers.generate``: same weights, same machine, one process.

    python benchmarks/vs_transformers.py                 # Qwen3-0.6B's shape, float32, CPU
    python benchmarks/vs_transformers.py --layers 4      # a quick look
    python benchmarks/vs_transformers.py --model smollm2-135m --workload streams

Three workloads, all greedy and with end-of-sequence disabled:

single  one request, 128 tokens in, 64 out
streams 8 requests, 64 tokens in, 32 out each
batch   32 requests, 64-512 in and 16-128 out (seeded). transformers gets them left-padded in one
        batch and generates until the longest is done; Reprise gets them as they are.

Only tokens that were asked for count. The engines take turns (A B A B) and the ratio is the median
over the turns, so that a machine that slows down or speeds up meanwhile changes little. Prints a
table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from reprise import LLM, SamplingParams
from reprise.bench.presets import CONFIGS
from reprise.bench.record import engine_facts, heading
from reprise.platforms import Platform

MODELS = ("qwen3-0.6b", "smollm2-135m")


@dataclass(frozen=True)
class Work:
    """Requests as (prompt, number of tokens to generate)."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)


def make_works(vocab_size: int, seed: int) -> list[Work]:
    """The three workloads."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    inputs = [rng.randint(64, 512) for _ in range(32)]
    outputs = [rng.randint(16, 128) for _ in range(32)]
    return [
        Work("single", [prompt(128)], [64]),
        Work("streams", [prompt(64) for _ in range(8)], [32] * 8),
        Work("batch", [prompt(length) for length in inputs], outputs),
    ]


def save_random_model(
    directory: str, preset: str, layers: int | None, dtype: torch.dtype, seed: int
) -> Any:
    """A transformers model of the preset's shape, also saved to ``directory``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads((CONFIGS / preset / "config.json").read_text())
    if layers is not None:
        raw["num_hidden_layers"] = layers
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    return model.eval()


class Transformers:
    """``generate`` with its dynamic cache and SDPA attention."""

    def __init__(self, model: Any, platform: Platform) -> None:
        self.model = model.to(platform.device)
        self.platform = platform

    def run(self, work: Work) -> list[list[int]]:
        longest = max(map(len, work.prompts))
        ids = torch.zeros(len(work.prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(work.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            generated = self.model.generate(
                input_ids=ids.to(self.platform.device),
                attention_mask=mask.to(self.platform.device),
                max_new_tokens=max(work.output_lens),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
            )
        rows = generated[:, longest:].tolist()
        return [row[:count] for row, count in zip(rows, work.output_lens, strict=True)]


class Reprise:
    """``LLM.generate`` with the options of every user, prefix caching off."""

    def __init__(self, directory: str, device: str, dtype: str) -> None:
        self.llm = LLM(
            directory,
            device=device,
            dtype=dtype,
            max_model_len=1024,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )

    def run(self, work: Work) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            for count in work.output_lens
        ]
        outputs = self.llm.generate(work.prompts, params, use_tqdm=False)
        return [each.outputs[0].token_ids for each in outputs]


@dataclass(frozen=True)
class Turn:
    """One engine's run of a workload."""

    seconds: float
    """Until all tokens are on the host."""
    cpu_seconds: float
    """Of all threads; on a machine that others use too, this says more than the clock."""
    tokens: list[list[int]]


def timed(run: Callable[[Work], list[list[int]]], work: Work) -> Turn:
    """Run and take the times."""
    began, cpu = time.perf_counter(), time.process_time()
    tokens = run(work)
    return Turn(time.perf_counter() - began, time.process_time() - cpu, tokens)


def compare(
    work: Work, reprise: Reprise, transformers: Transformers, repeats: int
) -> dict[str, Any]:
    """Take turns; returns the figures of one workload."""
    warm_up = Work(work.name, work.prompts, [min(2, each) for each in work.output_lens])
    for engine in (reprise, transformers):
        turn = timed(engine.run, warm_up)
        note(f"{work.name}: {type(engine).__name__} warmed up in {turn.seconds:.2f} s")
    turns: list[tuple[Turn, Turn]] = []
    for _ in range(repeats):
        ours, theirs = timed(reprise.run, work), timed(transformers.run, work)
        turns.append((ours, theirs))
        note(f"{work.name}: Reprise {ours.seconds:.2f} s, transformers {theirs.seconds:.2f} s")
    seconds = [statistics.median(pair[side].seconds for pair in turns) for side in (0, 1)]
    ratios = [theirs.seconds / ours.seconds for ours, theirs in turns]
    cpu_ratios = [theirs.cpu_seconds / ours.cpu_seconds for ours, theirs in turns]
    return {
        "name": work.name,
        "requests": len(work.prompts),
        "input_tokens": sum(map(len, work.prompts)),
        "output_tokens": work.output_tokens,
        "reprise_seconds": round(seconds[0], 3),
        "transformers_seconds": round(seconds[1], 3),
        "reprise_tokens_per_s": round(work.output_tokens / seconds[0], 2),
        "transformers_tokens_per_s": round(work.output_tokens / seconds[1], 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_all": [round(each, 3) for each in ratios],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "same_tokens": round(agreement(turns[-1][0].tokens, turns[-1][1].tokens), 4),
    }


def note(text: str) -> None:
    """Progress, on standard error: a run can take minutes."""
    print(text, file=sys.stderr, flush=True)


def agreement(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of tokens that come before a request's first difference."""
    same = total = 0
    for a, b in zip(found, expected, strict=True):
        total += len(a)
        differs = [x != y for x, y in zip(a, b, strict=True)]
        same += differs.index(True) if True in differs else len(a)
    return same / total


def profile(work: Work, reprise: Reprise, rows: int = 18) -> None:
    """Print where Reprise's time goes, by torch op; outputs are cut to keep the trace small."""
    short = Work(work.name, work.prompts, [min(8, each) for each in work.output_lens])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        reprise.run(short)
    print(f"--- {work.name}, {short.output_tokens} tokens")
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows))


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("workload", "requests", "in", "out", "Reprise s", "transformers s", "ratio",
                 "CPU ratio"):  # fmt: skip
        table.add_column(name, justify="left" if name == "workload" else "right")
    for each in results:
        table.add_row(
            each["name"],
            str(each["requests"]),
            str(each["input_tokens"]),
            str(each["output_tokens"]),
            f"{each['reprise_seconds']:.2f}",
            f"{each['transformers_seconds']:.2f}",
            f"{each['ratio']:.2f}x",
            f"{each['cpu_ratio']:.2f}x",
        )
    Console(width=max(100, Console().width)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="whose shape it is")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workload", choices=["single", "streams", "batch"], help="only this one")
    parser.add_argument("--profile", action="store_true", help="also profile Reprise by op")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    with tempfile.TemporaryDirectory(prefix="reprise-vs-") as directory:
        model = save_random_model(
            directory, options.model, options.layers, getattr(torch, options.dtype), options.seed
        )
        reprise = Reprise(directory, options.device, options.dtype)
    engine = reprise.llm.engine
    transformers = Transformers(model, engine.platform)
    works = [
        each
        for each in make_works(engine.vocab_size, options.seed)
        if options.workload in (None, each.name)
    ]
    results = [compare(each, reprise, transformers, options.repeats) for each in works]
    show(results)
    record = {
        **heading("vs_transformers", "benchmarks/vs_transformers.py"),
        **engine_facts(options.model, engine),
        "layers": options.layers,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "results": results,
    }
    print(json.dumps(record))
    if options.profile:
        for each in works:
            profile(each, reprise)


if __name__ == "__main__":
    main()

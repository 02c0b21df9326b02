"""What verification of graphs costs, against ``graph_verify=off`` on the same machine.

    python benchmarks/trust_cost.py --model qwen3-0.6b --modes off,auto,canary:1

Each mode runs in a process of its own: start-up, then a throughput workload from the first request
on, so that live canaries are in it. Prints a JSON line a mode, and the ratios to the first one.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import subprocess
import sys
from typing import Any

from reprise import LLM
from reprise.bench.drive import random_prompts, run
from reprise.bench.presets import engine_arguments


def child(model: str, mode: str, prompts: int, repeats: int, options: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    arguments = {"dtype": "bfloat16", "max_model_len": 4096, **options, "graph_verify": mode}
    engine = LLM(**engine_arguments(model, arguments)).engine
    rng = random.Random(0)
    lengths = [rng.randint(100, 1024) for _ in range(prompts)]
    outputs = [rng.randint(100, 1024) for _ in range(prompts)]
    speeds, counts = [], []
    for repeat in range(repeats):
        result = run(engine, random_prompts(lengths, engine.vocab_size, repeat), outputs)
        report = engine.runner.graphs.report()
        speeds.append(round(sum(outputs) / result.seconds, 1))
        counts.append([report.replays, report.canaries, report.unproven_eager, report.eager_steps])
    print(
        json.dumps(
            {
                "mode": mode,
                "device": engine.platform.device_name,
                "startup_seconds": round(engine.startup_seconds, 2),
                "verify_seconds": round(report.verify_seconds, 2),
                "tokens_per_s": speeds,
                "replays_canaries_unproven_eager": counts,
                "failures": report.canary_failures,
                "proof": collections.Counter(each.proof for each in report.graphs),
                "probes": sum(each.probes for each in report.graphs),
                # Milliseconds of a comparison and of a replay, one in how many, and how many.
                "canaries": {
                    each.name: [
                        round(1e3 * each.check_seconds, 2),
                        round(1e3 * each.replay_seconds, 2),
                        each.canary_every,
                        each.canaries,
                    ]
                    for each in report.graphs
                    if each.canaries or each.bucket in (1, 64, 256)
                },
            }
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--modes", default="off,auto")
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--options", default="{}", help="engine options, as JSON")
    parser.add_argument("--busy", type=int, default=0, help="processes that spin meanwhile")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        options = json.loads(given.options)
        child(given.model, given.child, given.num_prompts, given.repeats, options)
        return
    found = []
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(given.busy)]
    try:
        for mode in given.modes.split(","):
            command = [sys.executable, *sys.argv, "--child", mode]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.strip(), flush=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        for each in spinning:
            each.kill()
    first = found[0]
    for each in found[1:]:
        ratios = [
            round(a / b, 4)
            for a, b in zip(each["tokens_per_s"], first["tokens_per_s"], strict=True)
        ]
        later = round(each["startup_seconds"] - first["startup_seconds"], 2)
        print(f"{each['mode']}: {ratios} of {first['mode']}'s tokens/s, ready {later} s later")


if __name__ == "__main__":
    main()

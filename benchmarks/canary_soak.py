"""Replay graphs many times with canaries, and fail on a false alarm.

    python benchmarks/canary_soak.py --replays 100000 --graph-verify canary:100

The demo model generates for batches of changing size, so that steps cross buckets, with sampling,
chunked prefill and prefix hits. Every canary recomputes its step eagerly; on a sound device none
may fail. Prints one JSON line; exits 1 if a graph was quarantined.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

from reprise import LLM, SamplingParams


def soak(llm: LLM, replays: int, seed: int) -> None:
    """Generate until the graphs have been replayed so often."""
    rng = random.Random(seed)
    vocab = llm.engine.vocab_size
    shared = [rng.randrange(vocab) for _ in range(100)]
    while sum(each.replays for each in llm.graph_report().graphs) < replays:
        prompts, params = [], []
        for _ in range(rng.randint(1, 40)):
            own = [rng.randrange(vocab) for _ in range(rng.randint(1, 300))]
            prompts.append({"prompt_token_ids": [*shared[: rng.choice((0, 100))], *own]})
            temperature = rng.choice((0.0, 0.8))
            count = rng.randint(20, 1500)
            params.append(
                SamplingParams(
                    temperature=temperature, max_tokens=count, ignore_eos=True, detokenize=False
                )
            )
        llm.generate(prompts, params, use_tqdm=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replays", type=int, default=5000)
    parser.add_argument("--graph-verify", default="canary:100")
    parser.add_argument("--graph-mode", default="decode=full,mixed=breakable")
    parser.add_argument("--graph-buckets")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="{}", help="engine options, as JSON")
    options = parser.parse_args()
    llm = LLM(
        device=options.device,
        graph_mode=options.graph_mode,
        graph_verify=options.graph_verify,
        graph_buckets=options.graph_buckets,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        **json.loads(options.options),
    )
    began = time.perf_counter()
    soak(llm, options.replays, options.seed)
    report = llm.graph_report()
    quarantined = [each.name for each in report.graphs if each.quarantined]
    print(
        json.dumps(
            {
                "device": llm.engine.platform.device_name,
                "plan": report.plan,
                "graphs": len(report.graphs),
                "replays": sum(each.replays for each in report.graphs),
                "canaries": report.canaries,
                "canary_failures": report.canary_failures,
                "quarantined": quarantined,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )
    return 1 if quarantined or report.canary_failures else 0


if __name__ == "__main__":
    sys.exit(main())

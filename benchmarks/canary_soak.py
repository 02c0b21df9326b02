"""Replay graphs many times with canaries, and fail on a false alarm.

    python benchmarks/canary_soak.py --replays 100000 --graph-verify canary:100

On a CPU a smaller engine has more replays in the same time: ``--options '{"max_num_seqs": 8,
"max_num_batched_tokens": 64, "num_blocks": 600}'``. With ``"tensor_parallel_size": 2`` in it, and
``--drafts none,ngram``, two ranks compute, which compare their draws as well.

The demo model generates for batches of changing size, so that steps cross buckets, with sampling,
chunked prefill and prefix hits; one engine without drafts, one with n-gram drafts and one with the
demo's draft head take an equal share of the replays (``--drafts``), and with a head each owner of
graphs has as many: the target, the head's prefill and its chain. Every canary recomputes its
step eagerly; on a sound device none may fail. Prints a JSON line for each engine, and progress on
standard error; exits 1 if a graph was quarantined. Ctrl-C prints what was seen so far.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from typing import Any

from reprise import LLM, SamplingParams

DRAFTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 3},
    "eagle3": {"method": "eagle3", "num_speculative_tokens": 3},
}
TOLD_SECONDS = 30.0
EXIT_INTERRUPTED = 130


def replayed(llm: LLM) -> dict[str, int]:
    """Replays of the graphs of each owner that has any."""
    found: Counter[str] = Counter()
    for each in llm.graph_report().graphs:
        found[each.owner or "target"] += each.replays
    return dict(found)


def soak(llm: LLM, replays: int, seed: int) -> None:
    """Generate until the graphs of each owner have been replayed so often, or one was found
    wrong."""
    rng = random.Random(seed)
    vocab = llm.engine.vocab_size
    shared = [rng.randrange(vocab) for _ in range(100)]
    longest = llm.engine.max_model_len
    told = time.perf_counter()
    while (
        done := min(replayed(llm).values())
    ) < replays and not llm.graph_report().canary_failures:
        if time.perf_counter() - told > TOLD_SECONDS:
            told = time.perf_counter()
            canaries = llm.graph_report().canaries
            print(f"{done} of {replays} replays, {canaries} canaries", file=sys.stderr, flush=True)
        prompts, params = [], []
        for _ in range(rng.randint(1, max(1, llm.engine.config.max_num_seqs * 5 // 8))):
            own = [rng.randrange(vocab) for _ in range(rng.randint(1, 300))]
            # Texts that repeat themselves, so that drafts are found and count.
            own = rng.choice((own, (own[: rng.randint(1, 20)] * 300)[: len(own)]))
            prompts.append({"prompt_token_ids": [*shared[: rng.choice((0, 100))], *own]})
            temperature = rng.choice((0.0, 0.8))
            count = rng.randint(20, min(1500, longest - 401))
            params.append(
                SamplingParams(
                    temperature=temperature, max_tokens=count, ignore_eos=True, detokenize=False
                )
            )
        llm.generate(prompts, params, use_tqdm=False)


def engine(options: argparse.Namespace, drafts: str, replays: int) -> bool:
    """Soak one engine and print what was seen; whether no canary failed."""
    llm = LLM(
        device=options.device,
        graph_mode=options.graph_mode,
        graph_verify=options.graph_verify,
        graph_buckets=options.graph_buckets,
        speculative_config=DRAFTS[drafts],
        **{"max_num_seqs": 64, "max_num_batched_tokens": 512, **json.loads(options.options)},
    )
    began = time.perf_counter()
    interrupted = False
    try:
        soak(llm, replays, options.seed)
    except KeyboardInterrupt:
        interrupted = True
    report = llm.graph_report()
    quarantined = [each.name for each in report.graphs if each.quarantined]
    print(
        json.dumps(
            {
                "device": llm.engine.platform.device_name,
                "drafts": drafts,
                "plan": report.plan,
                "graphs": len(report.graphs),
                "replays": replayed(llm),
                "canaries": report.canaries,
                "canary_failures": report.canary_failures,
                "quarantined": quarantined,
                "seconds": round(time.perf_counter() - began, 1),
                "interrupted": interrupted,
            }
        ),
        flush=True,
    )
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)
    return not (quarantined or report.canary_failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--replays", type=int, default=100_000, help="of each owner, all engines together"
    )
    parser.add_argument(
        "--drafts", default=",".join(DRAFTS), help=f"which engines, of {', '.join(DRAFTS)}"
    )
    parser.add_argument("--graph-verify", default="canary:100")
    parser.add_argument("--graph-mode", default="decode=full,mixed=breakable")
    parser.add_argument("--graph-buckets")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="{}", help="engine options, as JSON")
    options = parser.parse_args()
    chosen = options.drafts.split(",")
    if unknown := [each for each in chosen if each not in DRAFTS]:
        parser.error(f"--drafts: {', '.join(unknown)}: expected some of {', '.join(DRAFTS)}")
    share = -(-options.replays // len(chosen))
    right = [engine(options, each, share) for each in chosen]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())

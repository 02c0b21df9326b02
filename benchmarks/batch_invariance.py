"""Compare answers in random batches with those that requests get alone, bit by bit.

    python benchmarks/batch_invariance.py --device cpu --model llama --compositions 10000

With ``batch_invariant=True`` logits and tokens of a request do not depend on what is computed
beside it. Requests of all kinds come and go at random, in engines that chunk prompts, share
prefixes, replay graphs, draft tokens and preempt requests; each answer's log probabilities of the
whole vocabulary must be to the bit those of an engine that computes the request alone. ``--model``
is a family (tiny random weights, see FAMILIES) or a directory; ``--op NAME=IMPL`` as everywhere.
Prints a JSON line for each engine, and exits 1 if a bit differed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reprise import LLM
from reprise.doctor import compositions

DENSE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **DENSE},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **DENSE},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **DENSE,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], **DENSE,
        "num_hidden_layers": 4, "full_attention_interval": 2, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2,
        "linear_num_value_heads": 6, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
    },
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
ENGINES: dict[str, dict[str, Any]] = {
    "eager, chunks": {"graph_mode": "none", "max_num_batched_tokens": 48},
    "full graphs": {"graph_mode": "decode=full,mixed=full", "max_num_batched_tokens": 64},
    "breakable graphs, few blocks": {"graph_mode": "breakable", "num_blocks": 70},
    "drafts": {"graph_mode": "auto", "speculative_config": NGRAM},
}
LONGEST = 400
"""Tokens of a request."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="llama", help="a family, or a directory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compositions", type=int, default=1000)
    parser.add_argument("--engines", default=",".join(ENGINES).replace(", ", " "))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", action="append", default=[], metavar="NAME=IMPL")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    names = {name.replace(", ", " "): options for name, options in ENGINES.items()}
    chosen = asked.engines.split(",")
    if unknown := [each for each in chosen if each not in names]:
        sys.exit(f"--engines {', '.join(unknown)}: choose of {', '.join(names)}")
    count = -(-asked.compositions // len(chosen))
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "model": asked.model, "device": asked.device, "dtype": asked.dtype,
            "skip_tokenizer_init": True, "batch_invariant": True, "max_num_seqs": 16,
            "num_blocks": 1000, "ops": dict(each.split("=", 1) for each in asked.op),
        }  # fmt: skip
        if asked.model in FAMILIES:
            Path(folder, "config.json").write_text(json.dumps(FAMILIES[asked.model]))
            common |= {"model": folder, "load_format": "dummy"}
        plain = LLM(**common, graph_mode="none", enable_prefix_caching=False)
        subjects = compositions.make_subjects(plain.engine.vocab_size, LONGEST, 32, asked.seed)
        expected = compositions.alone(plain, subjects)
        for name in chosen:
            began = time.perf_counter()
            llm = LLM(**{**common, **names[name]})
            found = compositions.run(llm, subjects, expected, count, asked.seed)
            failed |= bool(found.wrong)
            line = {
                "model": asked.model, "engine": name, "device": llm.engine.platform.device_name,
                "compositions": len(found.compositions), "steps": found.steps,
                "requests": found.requests, "most_at_once": max(found.rows),
                "prefixes_found": len(found.cached), "preempted": found.preempted,
                "steps_with_drafts": found.drafted, "wrong": found.wrong,
                "seconds": round(time.perf_counter() - began, 1),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
            del llm
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

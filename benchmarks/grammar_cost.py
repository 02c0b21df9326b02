"""What structured output costs a step, beside steps without.

    python benchmarks/grammar_cost.py --model qwen3-0.6b

Requests with a schema that is known already (its grammar is compiled and cached), and the
same requests without, in one engine and in turn. A step's time is the slope between a short and a
long output. MODEL is a directory, or a name of ``reprise bench`` for random weights, which get a
made-up tokenizer. Prints a JSON line a schema.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import _model, _prompt

from reprise import LLM, SamplingParams
from reprise.structured_outputs import StructuredOutputsParams

SCHEMAS: dict[str, Any] = {
    "a string": {"type": "string"},
    "integers": {"type": "array", "items": {"type": "integer"}, "minItems": 400},
    "objects": {
        "type": "array",
        "minItems": 100,
        "items": {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b", "long"]}, "text": {"type": "string"}},
            "required": ["kind", "text"],
        },
    },
}
"""None of which ends before the outputs do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--lengths", default="32,160", metavar="SHORT,LONG")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default={}, help="engine options, as JSON")
    arguments = parser.parse_args()
    short, long = map(int, arguments.lengths.split(","))
    prompts = [{"prompt_token_ids": _prompt(each)} for each in range(arguments.requests)]
    directory = tempfile.TemporaryDirectory()  # grammars are compiled from its tokenizer, later
    named = _model(arguments.model, Path(directory.name))
    options: dict[str, Any] = {"load_format": "dummy"} if "--load-format" in named else {}
    llm = LLM(named[1], device=arguments.device, **options, **arguments.options)

    def seconds(length: int, schema: Any) -> float:
        structured = None if schema is None else StructuredOutputsParams(json=schema)
        params = SamplingParams(
            temperature=arguments.temperature, seed=0, max_tokens=length, ignore_eos=True,
            structured_outputs=structured,
        )  # fmt: skip
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        spent = time.perf_counter() - began
        assert all(len(each.outputs[0].token_ids) == length for each in outputs), "one has ended"
        return spent

    def step(schema: Any) -> float:
        return (seconds(long, schema) - seconds(short, schema)) / (long - short)

    for name, schema in SCHEMAS.items():
        step(schema), step(None)
        steps = [(step(schema), step(None)) for _ in range(arguments.repeats)]
        found, plain = (statistics.median(each) for each in zip(*steps, strict=True))
        print(json.dumps({
            "schema": name, "requests": arguments.requests,
            "temperature": arguments.temperature, "step_ms": round(1e3 * found, 4),
            "plain_step_ms": round(1e3 * plain, 4), "ratio": round(found / plain, 4),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

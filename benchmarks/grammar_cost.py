"""What structured output costs a step, beside steps without.

    python benchmarks/grammar_cost.py --model qwen3-0.6b

Requests with a schema that is known already (its grammar is compiled and cached), and the
same requests without, in one engine and in turn. A step's time is the mean of those of a run
between the first and the second of two lengths, the median of several runs; each pair draws by
another seed, so that above temperature 0 its texts are other ones. A pair in which a replay was
compared with an eager step is left out and counted (``compared``): that takes as long as a dozen
steps, beside a grammar and without. MODEL is a directory, or a name
of ``reprise bench`` for random weights, which get a made-up tokenizer. Prints a JSON line a schema
and temperature, with how long a step waits for the device, and a hash of the first run's tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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
"""None of which ends before the outputs do, but by chance."""


SEEDS = 20
"""That are tried."""
LAST = 3
"""Steps of a run that are not looked at: requests end in them."""


class EndedError(Exception):
    """A text has ended before the outputs do: another seed may do."""


class ComparedError(Exception):
    """Verification has compared a replay: another seed may do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--lengths", default="32,160", metavar="SHORT,LONG")
    parser.add_argument("--temperature", default="0", help="one, or several: 0,0.8")
    parser.add_argument("--repeats", type=int, default=5, help="pairs behind the first one")
    parser.add_argument("--options", type=json.loads, default={}, help="engine options, as JSON")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: give at least 1")
    short, long = map(int, arguments.lengths.split(","))
    if not LAST < short < long:
        parser.error(f"--lengths: give two that grow, from {LAST + 1} on")
    prompts = [{"prompt_token_ids": _prompt(each)} for each in range(arguments.requests)]
    directory = tempfile.TemporaryDirectory()  # grammars are compiled from its tokenizer, later
    named = _model(arguments.model, Path(directory.name))
    options: dict[str, Any] = {"load_format": "dummy"} if "--load-format" in named else {}
    llm = LLM(named[1], device=arguments.device, **options, **arguments.options)

    marks: list[tuple[float, float]] = []
    """Behind each step the time, and how much of it the host has waited."""
    advance = llm.engine.step

    def marked() -> Any:
        found = advance()
        marks.append((time.perf_counter(), llm.engine.pipeline.wait_seconds))
        return found

    llm.engine.step = marked  # type: ignore[method-assign]

    def step(schema: Any, temperature: float, seed: int) -> list[float]:
        """Milliseconds of a step, and how many of them the host waits.

        Raises:
            EndedError: A text was shorter.
            ComparedError: A replay was compared with an eager step.
        """
        structured = None if schema is None else StructuredOutputsParams(json=schema)
        params = SamplingParams(
            temperature=temperature, seed=seed, max_tokens=long, ignore_eos=True,
            structured_outputs=structured,
        )  # fmt: skip
        marks.clear()
        before = llm.engine.runner.graphs.report()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = [list(each.outputs[0].token_ids) for each in outputs]
        if any(len(each) < long for each in tokens):
            raise EndedError
        if schema is not None:
            drawn.append(hashlib.sha256(repr(tokens).encode()).hexdigest()[:12])
        after = llm.engine.runner.graphs.report()
        if (after.canaries, after.unproven_eager) != (before.canaries, before.unproven_eager):
            raise ComparedError
        end = len(marks) - LAST
        pairs = zip(marks[end], marks[end - (long - short)], strict=True)
        return [1e3 * (later - sooner) / (long - short) for later, sooner in pairs]

    temperatures = [float(each) for each in arguments.temperature.split(",")]
    for temperature, (name, schema) in itertools.product(temperatures, SCHEMAS.items()):
        runs: list[tuple[float, ...]] = []
        drawn: list[str] = []
        compared = 0
        for seed in range(SEEDS):
            try:
                runs.append((*step(schema, temperature, seed), *step(None, temperature, seed)))
            except EndedError:
                continue
            except ComparedError:
                compared += 1
            if len(runs) > arguments.repeats:
                break
        runs = runs[1:]  # the first one has made grammars and masks
        if not runs:
            parser.error(
                f"--lengths {arguments.lengths}: with fewer than two of {SEEDS} seeds all texts of "
                f"{name!r} are that long at temperature {temperature:g} and no replay is compared "
                f"({compared} were); give shorter ones, or "
                "--temperature above 0, where seeds differ"
            )
        found, waits, plain, plain_waits = map(statistics.median, zip(*runs, strict=True))
        print(json.dumps({
            "schema": name, "requests": arguments.requests, "temperature": temperature,
            "step_ms": round(found, 4), "waits_ms": round(waits, 4),
            "plain_step_ms": round(plain, 4), "plain_waits_ms": round(plain_waits, 4),
            "ratio": round(found / plain, 4), "compared": compared, "tokens": drawn[0],
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

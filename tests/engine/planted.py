"""Engines with a fault planted in their graphs, and traffic that meets all kinds of steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from helpers import TinyModel, assert_idle, greedy, make_llm, random_ids

from reprise import LLM, SamplingParams
from reprise.ops import OpTable
from reprise.ops.registry import all_ops
from reprise.runner import model_runner
from reprise.testing.faults.base import Fault
from reprise.testing.faults.planted import PlantedFault

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 8, "num_blocks": 36,
    "max_model_len": 120, "graph_buckets": "decode=1,2,4;mixed=16,64",
}  # fmt: skip
"""The cache holds two of the longest requests, so that traffic preempts."""


PLACES = {
    "attention": ("paged_attention", "full"),
    "cache write in pieces": ("rotary_cache", "breakable"),
    "cache write": ("rotary_cache", "full"),
    "cache write, compiled": ("rotary_cache", "compiled"),
}
"""Where a fault is, and the executor."""
LONG = ("cache write", "cache write, compiled")
"""Left out of short runs: the fault and the capture are those of other places."""


@contextlib.contextmanager
def planted(
    monkeypatch: pytest.MonkeyPatch, fault: type[Fault], op: str, active: bool = True
) -> Iterator[list[Any]]:
    """Engines made in this block have the fault in their op: the list gets it, one an engine."""
    found: list[Fault] = []

    class BrokenTable(OpTable):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            broken = fault(self, all_ops()[op])
            self.functions[op] = broken
            found.append(broken)
            if isinstance(broken, PlantedFault):
                broken.active.fill_(active)

    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "OpTable", BrokenTable)
        yield found


def serve(llm: LLM, rounds: int = 1, **params: Any) -> list[list[int]]:
    """Greedy tokens of traffic with chunked prefill, chunks beside decodes, prefix hits, padding,
    one to four rows, and preemption."""
    long, other = random_ids(51, 100), random_ids(52, 70)
    waves = [
        [random_ids(53, 20)],
        [long, random_ids(54, 5), random_ids(55, 30), other],
        [[*long[:64], *random_ids(56, 6)]],
        [random_ids(57, 9), random_ids(58, 3), [*other[:40], 7, 8]],
        [random_ids(59, 17), random_ids(60, 41)],
        [[*long[:64], 3], [*other[:40], 9], [*long[:64], 4, 5], [*long[:64], 6]],
    ]
    found = []
    for _ in range(rounds):
        for number, wave in enumerate(waves):
            inputs = [{"prompt_token_ids": each} for each in wave]
            sampling: list[SamplingParams] = [
                greedy(12 + (5 * number + 3 * row) % 9, **params) for row in range(len(wave))
            ]
            outputs = llm.generate(inputs, sampling, use_tqdm=False)
            found += [list(each.outputs[0].token_ids) for each in outputs]
            assert_idle(llm)
    return found


def lend_counts(llm: LLM, victim: Any) -> None:
    """The sampler's counts lie where the fault does its harm."""
    seen = llm.engine.runner.sampler._kept.seen
    counts = seen.counts
    counts.set_(victim.untyped_storage(), 0, counts.shape, counts.stride())


Oracle = Callable[..., list[list[int]]]


def make_oracle(model: TinyModel, device: str) -> Oracle:
    """``oracle(**arguments of serve)``: the tokens of eager execution, each computed once."""
    known: dict[Any, list[list[int]]] = {}

    def oracle(**arguments: Any) -> list[list[int]]:
        key = tuple(sorted(arguments.items()))
        if key not in known:
            known[key] = serve(make_llm(model, device, **OPTIONS), **arguments)
        return known[key]

    return oracle


def wrong_tokens(got: list[list[int]], expected: list[list[int]]) -> int:
    return sum(
        a != b for mine, right in zip(got, expected, strict=True)
        for a, b in zip(mine, right, strict=True)
    )  # fmt: skip


def product(first: Sequence[Any], second: Sequence[Any], *others: Sequence[Any]) -> list[Any]:
    """All cases. Those with every two values of the first two factors, each with other values of
    the rest in turn, are run in any case; the rest is marked ``long``."""
    rest = list(itertools.product(*others))
    cases = []
    for (i, one), (j, two) in itertools.product(enumerate(first), enumerate(second)):
        short = (i + j * (len(rest) // 2)) % len(rest)
        long = two in LONG
        cases += [
            pytest.param(one, two, *each, marks=[pytest.mark.long] * (long or number != short))
            for number, each in enumerate(rest)
        ]
    return cases


def in_turn(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """All pairs. Each of the first factor is run in any case, with one of the second in turn: every
    pair has a test elsewhere."""
    short = [each for each in second if each not in LONG]
    return [
        pytest.param(
            one, two, marks=[pytest.mark.long] * (two != short[number % len(short)])
        )
        for number, one in enumerate(first) for two in second
    ]  # fmt: skip

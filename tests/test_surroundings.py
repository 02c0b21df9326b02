"""What a program has set for its own work with torch changes no bit of an engine's."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TinyModels, make_llm, random_ids
from torch.overrides import TorchFunctionMode

import reprise
from reprise import LLM, SamplingParams

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64, "long_factor": [1.5] * 8, "short_factor": [1.1] * 8,
    }},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "qwen3_moe": {},
    "qwen3_5": {},
    "deepseek_v4": {},
}  # fmt: skip
PROMPTS = [random_ids(number, 30 + 20 * number) for number in range(2)]
GRAPHS = {"graph_mode": "decode=full,mixed=breakable", "graph_buckets": "decode=1,2;mixed=64"}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=1),
    SamplingParams(temperature=0.9, seed=3, top_p=0.9, max_tokens=12, frequency_penalty=0.3),
]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


class Looks(TorchFunctionMode):
    """A user's own, which changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable[[str], Any]] = {
    "bfloat16 by default": lambda device: default_dtype(torch.bfloat16),
    "float64 by default": lambda device: default_dtype(torch.float64),
    "autocast": lambda device: torch.autocast(torch.device(device).type, dtype=torch.bfloat16),
    "another device by default": lambda device: torch.device("meta"),
    "deterministic algorithms": lambda device: deterministic(),
    "errors for warnings": lambda device: strict(),
    "a function mode": lambda device: Looks(),
}


def answers(llm: LLM) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    report = llm.graph_report()
    assert not report.quarantined, report.quarantined
    return [
        (each.outputs[0].token_ids, each.outputs[0].cumulative_logprob, each.prompt_logprobs)
        for each in outputs
    ]


@pytest.mark.covering(1)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graphs", [False, True])
def test_no_bit_of_an_answer_changes(
    tiny: TinyModels, device: str, family: str, graphs: bool, surroundings: str
) -> None:
    """Neither when the engine is made nor when it is asked."""
    model = tiny(family, **FAMILIES[family])
    # With prefix hits what is asked again would be other steps, which may round otherwise.
    options = {"enable_prefix_caching": False, **(GRAPHS if graphs else {})}
    expected = answers(make_llm(model, device, **options))
    with SURROUNDINGS[surroundings](device):
        inside = make_llm(model, device, **options)
        assert answers(inside) == expected
    assert answers(inside) == expected


FACTORIES = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}
ELSEWHERE = ("bench", "doctor", "testing", "cases.py")
"""What runs in processes of its own."""


def test_tensors_name_their_dtype() -> None:
    """What they have by default is the program's to say, for all of its threads."""
    root = Path(reprise.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if set(ELSEWHERE) & set(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("torch"), name), _, keywords):
                    named = {each.arg for each in keywords}
                    if name in FACTORIES and not named & {"dtype", "out", None}:
                        found.append(f"{path.relative_to(root)}:{node.lineno}: torch.{name}")
    assert not found

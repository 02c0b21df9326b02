"""What an engine can do, what may happen to a request, and what must not change by it: its tokens.

A case is one engine: an executor, a model, and how many tokens are drafted. Each is run under one
disturbance, and every request must get the tokens that it gets alone, undisturbed, from an engine
that drafts nothing and captures nothing. ``COVERING`` has every two of a feature and a disturbance
once; ``PRODUCT`` has all.

Same tokens means: in float32 exactly. In bfloat16 rounding may decide between two tokens that are
nearly as likely, and kernels of other shapes round otherwise: there the first token that differs
must have been chosen over one whose logit is less than :data:`BFLOAT16_GAP` below, in at most
:data:`BFLOAT16_SHARE` of the requests.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import (
    CONTEXT,
    TinyModel,
    TinyModels,
    assert_idle,
    greedy,
    make_llm,
    random_ids,
    token_ids,
)
from quantized import EIGHT_BITS, FOUR_BITS, quantized

from reprise import LLM, SamplingParams
from reprise.cache import State
from reprise.layers import gated_delta
from reprise.runner import model_runner

BFLOAT16_GAP = 0.25
"""Of logits whose largest are some tens: two roundings of eight bits."""
BFLOAT16_SHARE = 0.01

TOKENS = 20
SHARED = random_ids(900, 32)
PATTERN = random_ids(901, 5)
PROMPTS = [
    [*SHARED, *random_ids(902, 9)],
    PATTERN * 7,
    random_ids(903, 3),
    [*SHARED, *PATTERN, *PATTERN[:3]],
]
PARAMS = [
    greedy(TOKENS),
    SamplingParams(temperature=0.8, top_p=0.95, seed=11, max_tokens=TOKENS),
    greedy(TOKENS, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4),
]
SUBJECTS = [(prompt, params) for prompt in PROMPTS for params in PARAMS]

EXECUTORS = ("none", "full", "breakable", "compiled")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "hybrid": {"num_hidden_layers": 2, "full_attention_interval": 2},
    "experts": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
}
"""Fields of a tiny Qwen3's config; with windows every second layer has one. The hybrid is a
Qwen3.5: a layer of linear attention, a layer of full attention. The one with experts is a Qwen3-MoE
with a dense layer between."""
ARCHITECTURES = {"hybrid": "qwen3_5", "experts": "qwen3_moe"}
HYBRID = "hybrid"
CHECKPOINT = State(16)
"""Of the hybrid: the requests here are short."""
DRAFTS = (0, 1, 3, 7)
FORMATS = ("plain", *EIGHT_BITS, *FOUR_BITS)
"""Of the weights; each other one is compared with itself."""


@dataclass(frozen=True)
class Features:
    """One of each."""

    executor: str
    model: str
    drafts: int
    format: str = "plain"

    def __str__(self) -> str:
        weights = "" if self.format == "plain" else f", {self.format}"
        return f"{self.executor}, {self.model}, {self.drafts} drafts{weights}"


def engine(
    features: Features, model: TinyModel, device: str, *, ahead: bool = False, **options: Any
) -> LLM:
    """One with these features, which a disturbance may make smaller."""
    config: dict[str, Any] = {
        "graph_mode": features.executor, "graph_buckets": "decode=3,6;mixed=64",
        "max_num_seqs": 6, "num_blocks": 257, "block_size": 8,
    }  # fmt: skip
    if features.drafts:
        config["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": features.drafts,
            "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_delta, "STATE", CHECKPOINT)
        if ahead:
            buffers = functools.partial(model_runner.StepBuffers, shared=False)
            patch.setattr(model_runner, "StepBuffers", buffers)
        llm = make_llm(model, device, **{**config, **options})
    if ahead:
        llm.engine._depth = 2
    return llm


def answers(llm: LLM, order: Sequence[int] | None = None) -> list[Any]:
    """The output of each subject, all submitted together."""
    order = range(len(SUBJECTS)) if order is None else order
    prompts = [{"prompt_token_ids": SUBJECTS[number][0]} for number in order]
    outputs = llm.generate(prompts, [SUBJECTS[number][1] for number in order], use_tqdm=False)
    assert_idle(llm)
    return [output for _, output in sorted(zip(order, outputs, strict=True), key=lambda x: x[0])]


Disturbance = Callable[..., list[Any]]
"""Takes features, a model, a device, and options of the engine."""


def bucket(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """Every step is padded, most of them by half and more."""
    return answers(engine(features, model, device, graph_buckets="decode=6;mixed=64", **options))


def neighbours(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """Strangers of other lengths, parameters and ends, in another order."""
    llm = engine(features, model, device, **options)
    for number in range(6):
        stranger = SamplingParams(
            temperature=1.2, max_tokens=2 + 5 * number, seed=number, frequency_penalty=0.9,
            logit_bias={5: 9.0}, logprobs=number % 3,
        )  # fmt: skip
        llm.engine.add(f"stranger {number}", random_ids(910 + number, 4 + 9 * number), stranger)
    return answers(llm, range(len(SUBJECTS) - 1, -1, -1))


def chunking(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """A step has room for all decodes and a few tokens of a prompt."""
    width = 1 + (next(each for each in DRAFTS if each >= features.drafts))
    room = 6 * width + 3
    return answers(engine(features, model, device, max_num_batched_tokens=room, **options))


def prefix_hit(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """Everything is asked twice."""
    if features.model == HYBRID:
        options.setdefault("max_num_seqs", 24)  # room for states of those that have left
    llm = engine(features, model, device, **options)
    answers(llm)
    outputs = answers(llm)
    hits = [bool(each.metrics.num_cached_tokens) for each in outputs]
    long = [len(each.prompt_token_ids) > 8 for each in outputs]
    # States are kept at some places only.
    assert any(hits) if features.model == HYBRID else hits == long
    return outputs


def preemption(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """The cache holds the longest request and little more; and all that run are computed again now
    and then, since with windows none has to give way."""
    tight = {"num_blocks": 18, "max_model_len": 96, **options}
    llm = engine(features, model, device, ahead=True, **tight)
    inner = llm.engine
    groups = [inner.add(f"{n}", prompt, params) for n, (prompt, params) in enumerate(SUBJECTS)]
    for number in itertools.count():
        if not inner.has_work:
            break
        if number % 16 == 9:
            inner.scheduler.recompute()
        inner.step()
    assert_idle(llm)
    outputs = [each.output() for each in groups]
    assert sum(each.metrics.num_preemptions for each in outputs) > 0
    return outputs


def run_ahead(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """A step is submitted before the last one's tokens are known."""
    return answers(engine(features, model, device, ahead=True, **options))


def abort(features: Features, model: TinyModel, device: str, **options: Any) -> list[Any]:
    """Requests beside the subjects are given up while steps are under way; their rows and blocks
    are others' then."""
    llm = engine(features, model, device, ahead=True, **options)
    inner = llm.engine
    groups = []
    for number, (prompt, params) in enumerate(SUBJECTS):
        inner.add(f"given up {number}", random_ids(930 + number, 5 + 6 * number), greedy(40))
        groups.append(inner.add(f"{number}", prompt, params))
    given_up = iter(range(len(SUBJECTS)))
    while inner.has_work:
        inner.step()
        inner.abort([f"given up {next(given_up, 0)}"])
    assert_idle(llm)
    return [each.output() for each in groups]


DISTURBANCES: dict[str, Disturbance] = {
    each.__name__: each
    for each in (bucket, neighbours, chunking, prefix_hit, preemption, run_ahead, abort)
}

COVERING = [
    # Compiling takes long: the executor has a test of its own, and the product has it.
    Features("none", "plain", 7),
    Features("full", "windows", 3),
    Features("breakable", "experts", 1),
    Features("breakable", HYBRID, 0),
    Features("none", "plain", 0, "fp8"),
    Features("none", "plain", 0, "awq"),
]
"""Between them every feature, and both products of fewer bits; each is run under every
disturbance."""
IN_EACH_FORMAT = [("none", 0), ("full", 0), ("full", 3), ("breakable", 0), ("compiled", 1)]
"""Executors and drafts."""
PRODUCT = [
    *(
        Features(*each)
        for each in itertools.product(EXECUTORS, MODELS, DRAFTS)
        if each[1] != HYBRID or each[2] == 0  # drafts are refused there
    ),
    *(
        Features(executor, "plain", drafts, format)
        for format in FORMATS[1:]
        for executor, drafts in IN_EACH_FORMAT
    ),
]


class Alone:
    """What each subject gets alone, by model and format."""

    def __init__(self, tiny: TinyModels, device: str, **options: Any) -> None:
        self._tiny, self._device, self._options = tiny, device, options
        self._known: dict[tuple[str, str], list[list[int]]] = {}

    def model(self, features: Features) -> TinyModel:
        kind = ARCHITECTURES.get(features.model, "qwen3")
        plain = self._tiny(kind, **MODELS[features.model])
        return plain if features.format == "plain" else quantized(plain, features.format)

    def tokens(self, features: Features) -> list[list[int]]:
        name = features.model, features.format
        if name not in self._known:
            llm = make_llm(
                self.model(features), self._device, max_num_batched_tokens=CONTEXT,
                enable_prefix_caching=False, **self._options,
            )  # fmt: skip
            self._known[name] = [
                token_ids(llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False))[0]
                for prompt, params in SUBJECTS
            ]
        return self._known[name]

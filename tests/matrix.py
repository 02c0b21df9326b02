"""What an engine can do, what may happen to a request, and what must not change by it: its tokens.

A case is an executor, a model, and how many tokens are drafted. Under each disturbance every
request must get the tokens that it gets alone, undisturbed, from an engine that drafts nothing and
captures nothing. ``COVERING`` has every two of a feature and a disturbance once; ``PRODUCT`` has
all.

To start an engine, which compiles, captures and proves its graphs, costs as much as several
disturbances of it. So those that need no other engine than a plain one share it, in the order of
``DISTURBANCES``. The first of them meets graphs that know only the steps of the start, as in an
engine of its own.

A live step of a kind that the start has not met is compared with eager execution, and gets what
that gives: three of four steps here, so that most tokens would be right whatever graphs do. So
that is left on under a quarter of a case's disturbances, of other ones in the next case; under the
others such steps are replayed, with nobody to put a wrong token right (:meth:`Case.under`). In the
product every executor, model, number of drafts and drafter meets every disturbance both ways.

Same tokens means exactly those. In bfloat16 rounding decides between two tokens that are nearly as
likely, and kernels of other shapes round otherwise: no request can say then whether anything went
wrong. So there the subjects are chosen: of what :func:`decided` gives rounding decides nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_heads import write_head
from helpers import (
    CONTEXT,
    TinyModel,
    TinyModels,
    assert_idle,
    copied_inputs,
    greedy,
    make_llm,
    random_ids,
    rewritten_logits,
    token_ids,
)
from quantized import EIGHT_BITS, FOUR_BITS, quantized
from safetensors.torch import load_file
from torch import Tensor

from reprise import LLM, SamplingParams
from reprise.cache import CacheManager, State
from reprise.graphs.trust import Ledger
from reprise.layers import gated_delta
from reprise.sampling_params import WHOLE_VOCABULARY

MARGIN = 0.04
"""Of a row's largest logit. Two ways to round have been seen to differ by 0.05 somewhere in a row,
by 0.025 in 99 rows of 100; with activations of eight bits by 0.25."""
WEIGHTS = 0.002
"""Of each weight, a standard deviation: what bfloat16 rounds by at most."""
COMPARED = 4
"""Under one in so many disturbances live steps are compared."""
TRIES = 400
"""Candidates of each kind that :func:`decided` looks at, until one will do."""

SHARED = random_ids(900, 32)
Subject = tuple[list[int], SamplingParams]


def candidates(seed: int, tokens: int, **draw: float) -> list[Subject]:
    """Twelve requests for so many tokens; those with another seed are others of the same kinds."""
    pattern = random_ids(seed + 1, 5)
    prompts = [
        [*SHARED, *random_ids(seed + 2, 9)],
        pattern * 7,
        random_ids(seed + 3, 3),
        [*SHARED, *pattern, *pattern[:3]],
    ]
    parameters = [
        greedy(tokens),
        SamplingParams(**draw, seed=seed, max_tokens=tokens),
        greedy(tokens, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4),
    ]
    return [(prompt, params) for prompt in prompts for params in parameters]


SUBJECTS = tuple(candidates(900, tokens=15, temperature=0.8, top_p=0.95))
"""Each of them ends in another block than its prompt."""

EXECUTORS = ("none", "full", "breakable", "compiled")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "hybrid": {"num_hidden_layers": 2, "full_attention_interval": 2},
    "experts": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "latent": {
        "num_hidden_layers": 2,
        "compress_ratios": [0, 4, 0],
        "num_hash_layers": 1,
        "hc_sinkhorn_iters": 4,
        "max_position_embeddings": CONTEXT,
    },
    "codes": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
}
"""Fields of a tiny Qwen3's config; with windows every second layer has one. The hybrid is a
Qwen3.5: a layer of linear attention, a layer of full attention. The one with experts is a Qwen3-MoE
with a dense layer between; the latent one a DeepSeek-V4, a layer with a window alone and one with
compressed rows, whose matrices are normalised 4 times: 20 take a tenth of a step more; that with
codes has windows and a cache of eight bits."""
ARCHITECTURES = {"hybrid": "qwen3_5", "experts": "qwen3_moe", "latent": "deepseek_v4"}
HYBRID = "hybrid"
CODES = "codes"
ENGINES: dict[str, dict[str, Any]] = {CODES: {"kv_cache_dtype": "fp8"}}
"""Options of the engines of a model."""
BOUNDED = (HYBRID, "latent", "windows", CODES)
"""Models of which requests that have left are remembered only as far as there is room for more
that run: for states, and for what is bounded as they are."""
CHECKPOINT = State(16)
"""Of the hybrid: the requests here are short."""
DRAFTS = (0, 1, 3, 7)
NGRAM: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
DRAFTERS = ("ngram", "draft_model", "eagle3")
FORMATS = ("plain", *EIGHT_BITS, *FOUR_BITS)
"""Of the weights; each other one is compared with itself."""


@dataclass(frozen=True)
class Features:
    """One of each."""

    executor: str
    model: str
    drafts: int
    format: str = "plain"
    drafter: str = "ngram"

    def __str__(self) -> str:
        weights = "" if self.format == "plain" else f", {self.format}"
        by = "" if self.drafter == "ngram" else f" by {self.drafter}"
        return f"{self.executor}, {self.model}, {self.drafts} drafts{by}{weights}"


def ahead_of_its_tokens(model: TinyModel, device: str, **options: Any) -> LLM:
    """One that submits the next step before it knows this one's tokens, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        copied_inputs(patch)
        llm = make_llm(model, device, **options)
    llm.engine.pipeline.depth = 2
    return llm


@dataclass(frozen=True)
class Case:
    """An engine that is disturbed, and the requests that must not notice."""

    features: Features
    model: TinyModel
    device: str
    subjects: Sequence[Subject] = SUBJECTS
    dtype: str = "float32"
    draft: Path | None = None
    """Where the model or the head is that drafts, if one does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of the engine."""
    _kept: list[LLM] = field(default_factory=list, init=False, repr=False, compare=False)
    """The shared one, if there is one by now."""

    def engine(self, *, ahead: bool = False, **options: Any) -> LLM:
        """One with these features, which a disturbance may make smaller."""
        config: dict[str, Any] = {
            "graph_mode": self.features.executor, "graph_buckets": "decode=3,6;mixed=64",
            "max_num_seqs": 6, "num_blocks": 257, "block_size": 8, "dtype": self.dtype,
        }  # fmt: skip
        config |= {**ENGINES.get(self.features.model, {}), **self.options}
        if self.features.drafts:
            by: dict[str, Any] = NGRAM
            if self.draft is not None:
                by = {"method": self.features.drafter, "model": str(self.draft)}
            count = {"num_speculative_tokens": self.features.drafts}
            config["speculative_config"] = {**by, **count, **options.pop("drafts", {})}
        make = ahead_of_its_tokens if ahead else make_llm
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gated_delta, "STATE", CHECKPOINT)
            return make(self.model, self.device, **{**config, **options})

    @contextlib.contextmanager
    def shared(
        self,
        *,
        ahead: bool = False,
        requests: int = 6,
        max_tokens: int | None = None,
        free: int | None = None,
    ) -> Iterator[LLM]:
        """The plain engine of this case, in which nobody finds a prefix of what ran before.

        Args:
            ahead: It submits the next step before it knows this one's tokens, whatever the device.
            requests: Most that run.
            max_tokens: Most in a step, if they are to be fewer than it has room for.
            free: Blocks of a table that keeps all, if there are to be fewer than it has. Of others
                there are as many as six requests need.
        """
        if not self._kept:
            options = {"max_num_seqs": 24} if self.features.model in BOUNDED else {}
            self._kept.append(self.engine(ahead=True, **options))
        llm = self._kept[0]
        llm.reset_prefix_cache()
        pipeline, planner = llm.engine.pipeline, llm.engine.scheduler.planner
        cache, taken = llm.engine.scheduler.cache, []
        with pytest.MonkeyPatch.context() as patch:
            if not ahead and not llm.engine.platform.asynchronous:
                patch.setattr(pipeline, "depth", 1)
            patch.setattr(planner, "max_requests", min(requests, planner.max_requests))
            if max_tokens is not None:
                patch.setattr(planner, "max_tokens", min(max_tokens, planner.max_tokens))
            if free is not None:
                patch.setattr(planner, "_reserve", [0 for _ in cache.pools])
                taken = take(cache, free)
            yield llm
            for pool, blocks in zip(cache.pools, taken, strict=bool(taken)):
                pool.free(blocks)

    def different(
        self,
        expected: Sequence[Any],
        names: Iterable[str] | None = None,
        *,
        of: Callable[[Sequence[Any]], Sequence[Any]] = token_ids,
    ) -> dict[str, list[int]]:
        """By disturbance the subjects that do not get what is expected; of all ``names``, or of
        all that there are. Disturbances that change nothing are left out."""
        found = {}
        for name in DISTURBANCES if names is None else names:
            try:
                got = of(self.under(name))
            except BaseException as error:
                error.add_note(f"{self.features}: {name}")
                raise
            assert len(got) == len(expected)
            if wrong := [n for n, each in enumerate(got) if each != expected[n]]:
                found[name] = wrong
        return found

    def under(self, name: str) -> list[Any]:
        """The output of each subject under a disturbance."""
        with pytest.MonkeyPatch.context() as patch:
            if not self.compares(name):
                patch.setattr(Ledger, "trusts", lambda ledger, graph, kind: True)
            return DISTURBANCES[name](self)

    def compares(self, name: str) -> bool:
        """Whether steps of kinds that the start has not met are compared, and not replayed."""
        features = self.features
        places = (
            EXECUTORS.index(features.executor), list(MODELS).index(features.model),
            DRAFTS.index(features.drafts), 2 * DRAFTERS.index(features.drafter),
            list(DISTURBANCES).index(name),
        )  # fmt: skip
        return sum(places) % COMPARED == 0

    def answers(self, llm: LLM, order: Sequence[int] | None = None) -> list[Any]:
        """The output of each subject, all submitted together."""
        order = range(len(self.subjects)) if order is None else order
        prompts = [{"prompt_token_ids": self.subjects[number][0]} for number in order]
        params = [self.subjects[number][1] for number in order]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert_idle(llm)
        return [each for _, each in sorted(zip(order, outputs, strict=True), key=lambda x: x[0])]


def take(cache: CacheManager, free: int) -> list[list[int]]:
    """Blocks of each pool, taken so that no more than ``free`` are left of each table that keeps
    all, and of a bounded one a quarter: a shared engine has room for four times as many."""
    taken = []
    for number, pool in enumerate(cache.pools):
        tables = cache.layout.of_pool(number)
        if all(each.lifetime.bounded for each in tables):
            left = pool.num_free // 4
        else:
            left = free * len(tables)
        taken.append(pool.allocate(pool.num_free - left))
    return taken


Disturbance = Callable[[Case], list[Any]]


def bucket(case: Case) -> list[Any]:
    """Four run, of buckets of three and six: steps are padded as long as any waits."""
    with case.shared(requests=4) as llm:
        return case.answers(llm)


def neighbours(case: Case) -> list[Any]:
    """Strangers of other lengths, parameters and ends, in another order."""
    with case.shared() as llm:
        for number in range(6):
            stranger = SamplingParams(
                temperature=1.2, max_tokens=2 + 5 * number, seed=number, frequency_penalty=0.9,
                logit_bias={5: 9.0}, logprobs=number % 3,
            )  # fmt: skip
            llm.engine.add(f"stranger {number}", random_ids(910 + number, 4 + 9 * number), stranger)
        return case.answers(llm, range(len(case.subjects) - 1, -1, -1))


def chunking(case: Case) -> list[Any]:
    """A step has room for all decodes and a few tokens of a prompt."""
    width = 1 + (next(each for each in DRAFTS if each >= case.features.drafts))
    with case.shared(max_tokens=6 * width + 3) as llm:
        return case.answers(llm)


def prefix_hit(case: Case) -> list[Any]:
    """Everything is asked twice."""
    hybrid = case.features.model == HYBRID
    with case.shared() as llm:
        case.answers(llm)
        outputs = case.answers(llm)
    hits = [bool(each.metrics.num_cached_tokens) for each in outputs]
    long = [len(each.prompt_token_ids) > 8 for each in outputs]
    # States are kept at some places only.
    assert any(hits) if hybrid else hits == long
    return outputs


def preemption(case: Case) -> list[Any]:
    """The cache holds the longest request and little more; and all that run are computed again now
    and then, since with windows none has to give way."""
    with case.shared(ahead=True, free=17) as llm:
        inner = llm.engine
        held = llm.stats().scheduler.num_blocks_used
        groups = [inner.add(f"{n}", *subject) for n, subject in enumerate(case.subjects)]
        for number in itertools.count():
            if not inner.has_work:
                break
            if number % 16 == 9:
                inner.scheduler.recompute()
            inner.step()
        assert llm.stats().scheduler.num_blocks_used == held
    assert_idle(llm)
    outputs = [each.output() for each in groups]
    assert sum(each.metrics.num_preemptions for each in outputs) > 0
    return outputs


def run_ahead(case: Case) -> list[Any]:
    """A step is submitted before the last one's tokens are known."""
    with case.shared(ahead=True) as llm:
        return case.answers(llm)


def abort(case: Case) -> list[Any]:
    """Requests beside the subjects are given up while steps are under way; their rows and blocks
    are others' then."""
    with case.shared(ahead=True) as llm:
        inner = llm.engine
        groups = []
        for number, (prompt, params) in enumerate(case.subjects):
            inner.add(f"given up {number}", random_ids(930 + number, 5 + 6 * number), greedy(40))
            groups.append(inner.add(f"{number}", prompt, params))
        given_up = iter(range(len(case.subjects)))
        while inner.has_work:
            inner.step()
            inner.abort([f"given up {next(given_up, 0)}"])
        assert_idle(llm)
        return [each.output() for each in groups]


def other_drafts(case: Case) -> list[Any]:
    """How many tokens are drafted changes all the time; where none are, nothing does."""
    most = case.features.drafts
    if not most:
        with case.shared() as llm:
            return case.answers(llm)
    ranges = [[100 + each, 100 + each, each] for each in sorted({0, 1, most})]
    llm = case.engine(ahead=True, drafts={"num_speculative_tokens_per_batch_size": ranges})
    taken = change_drafts(llm, seed=most)
    outputs = case.answers(llm)
    assert set(taken) == {0, 1, most}
    return outputs


def change_drafts(llm: LLM, seed: int) -> list[int]:
    """Has the engine draft another number of tokens every other step, of those that it may;
    returns those that it took."""
    chance, taken = random.Random(seed), []
    levels = list(llm.engine.config.speculation.levels)
    first = chance.sample(levels, len(levels))

    def choose(requests: int) -> int:
        if first:  # however few steps there are
            taken.append(first.pop())
        elif chance.random() < 0.6:
            taken.append(chance.choice(levels))
        return taken[-1]

    llm.engine.scheduler.planner.drafting = choose
    return taken


DISTURBANCES: dict[str, Disturbance] = {
    each.__name__: each
    for each in (
        bucket,
        neighbours,
        chunking,
        prefix_hit,
        preemption,
        run_ahead,
        abort,
        other_drafts,
    )
}

IN_BITS = [
    Features("full", "windows", 3, drafter="draft_model"),
    Features("full", CODES, 0),
    Features("breakable", "experts", 1, drafter="eagle3"),
    Features("breakable", HYBRID, 3),
    Features("compiled", "plain", 0),
    Features("none", "plain", 7),
]
"""What ``batch_invariant`` is tried with: what it does not support is refused."""

COVERING = [
    # Compiling takes long: the executor has a test of its own, and the product has it.
    Features("full", "windows", 3, drafter="draft_model"),
    Features("full", CODES, 0, "awq"),
    Features("breakable", "experts", 1, drafter="eagle3"),
    Features("breakable", HYBRID, 3),
    Features("none", "plain", 7, "fp8"),
]
"""Between them every feature, and both products of fewer bits; each is run under every
disturbance. One for each model is as few as can be."""
IN_EACH_FORMAT = [("none", 0), ("full", 0), ("full", 3), ("breakable", 0), ("compiled", 1)]
"""Executors and drafts."""
PRODUCT = [
    *(Features(*each) for each in itertools.product(EXECUTORS, MODELS, DRAFTS)),
    *(
        Features(executor, model, drafts, drafter="draft_model")
        for executor, model, drafts in itertools.product(EXECUTORS, MODELS, DRAFTS[1:])
    ),
    *(
        Features(executor, model, drafts, drafter="eagle3")
        for executor, model, drafts in itertools.product(EXECUTORS, MODELS, DRAFTS[1:])
        if model != "latent"  # between its layers there are several streams
    ),
    *(
        Features(executor, "plain", drafts, format)
        for format in FORMATS[1:]
        for executor, drafts in IN_EACH_FORMAT
    ),
]


class Alone:
    """What each subject gets alone, by model and format."""

    def __init__(self, tiny: TinyModels, device: str) -> None:
        self._tiny, self._device = tiny, device
        self._known: dict[tuple[str, str], list[list[int]]] = {}

    def model(self, features: Features, **options: Any) -> TinyModel:
        kind = ARCHITECTURES.get(features.model, "qwen3")
        plain = self._tiny(kind, **MODELS[features.model], **options)
        return plain if features.format == "plain" else quantized(plain, features.format)

    def case(self, features: Features, model: TinyModel | None = None) -> Case:
        """An engine with these features, of another model than their own if one is given."""
        model = model or self.model(features)
        return Case(features, model, self._device, draft=self._draft(features.drafter, model))

    def _draft(self, drafter: str, model: TinyModel) -> Path | None:
        if drafter == "ngram":
            return None
        if drafter == "draft_model":
            return self._tiny.near(model).path
        # Of random weights: what it drafts is wrong, and must change nothing.
        path = model.path.with_name(f"{model.path.name}-head")
        return path if path.exists() else write_head(path, model, depths=(0, 1, 2))

    def tokens(self, features: Features) -> list[list[int]]:
        name = features.model, features.format
        if name not in self._known:
            options = ENGINES.get(features.model, {})
            self._known[name] = alone(self.model(features), self._device, **options)
        return self._known[name]


def alone(
    model: TinyModel, device: str, subjects: Sequence[Subject] = SUBJECTS, **options: Any
) -> list[list[int]]:
    """What each subject gets from an engine that has nothing else to do, and none of the
    features."""
    llm = make_llm(
        model, device, max_num_batched_tokens=CONTEXT, enable_prefix_caching=False, **options
    )
    return [
        token_ids(llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False))[0]
        for prompt, params in subjects
    ]


def in_bits(subjects: Sequence[Subject] = SUBJECTS) -> list[Subject]:
    """The same, with the log probabilities of the whole vocabulary at each token."""
    return [(prompt, replace(params, logprobs=WHOLE_VOCABULARY)) for prompt, params in subjects]


def bits(outputs: Sequence[Any]) -> list[list[tuple[int, bytes]]]:
    """Of each output its tokens and their log probabilities."""
    first = [each.outputs[0] for each in outputs]
    return [
        [(token, entry.parts[1].tobytes()) for token, entry in zip(*pair, strict=True)]
        for pair in ((each.token_ids, each.logprobs) for each in first)
    ]


def decided(model: TinyModel, device: str) -> list[Subject]:
    """One of each kind of subjects, the first that rounding decides nothing of: bfloat16 gives the
    tokens of float32, and gives them still if the logit of each is lowered by :data:`MARGIN` of its
    row's largest, and all are changed by half as much at random, several times. (A draw inverts the
    cumulative distribution: there others decide, too.) And still if all weights are changed by
    :data:`WEIGHTS`: a router with two choices near each other takes another expert then, which
    moves logits by more than their margin."""
    options: dict[str, Any] = {
        "max_num_seqs": 64, "num_blocks": 1025, "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
    }  # fmt: skip
    exact = make_llm(model, device, **options)
    rounding = make_llm(model, device, **options, dtype="bfloat16")

    def run(llm: LLM, subjects: Sequence[Subject]) -> list[list[int]]:
        groups = [llm.engine.add(f"{n}", *each) for n, each in enumerate(subjects)]
        while llm.engine.has_work:
            llm.engine.step()
        return token_ids([each.output() for each in groups])

    noise = torch.Generator().manual_seed(0)
    weights = load_file(model.path / "model.safetensors")

    def others() -> dict[str, Tensor]:
        return {
            name: each * (1 + WEIGHTS * torch.randn(each.shape, generator=noise))
            for name, each in weights.items()
        }

    def disturb(tokens: list[Iterator[int]], request: str, row: Tensor) -> Tensor:
        margin = MARGIN * row.abs().max()
        row[next(tokens[int(request)], 0)] -= margin
        return row + margin * (torch.rand(row.shape, generator=noise) - 0.5)

    chosen: dict[int, Subject] = {}
    seeds = iter(range(1000, 1000 + 10 * TRIES, 10))
    while missing := [kind for kind in range(len(SUBJECTS)) if kind not in chosen]:
        some = [candidates(seed, tokens=12, temperature=0.2) for seed in itertools.islice(seeds, 5)]
        assert some, f"no subject of the kinds {missing} in {TRIES} is drawn with a margin"
        tried = [(kind, each[kind]) for each in some for kind in missing]
        subjects = [each for _, each in tried]
        drawn = run(exact, subjects)
        rounding.update_weights(weights)
        rounded = [run(rounding, subjects)]
        for _ in range(3):
            rest = [iter(each) for each in drawn]
            rounding.update_weights(others())
            with rewritten_logits(rounding, functools.partial(disturb, rest)):
                rounded.append(run(rounding, subjects))
        for (kind, subject), right, *found in zip(tried, drawn, *rounded, strict=True):
            if all(each == right for each in found):
                chosen.setdefault(kind, subject)
    return [chosen[kind] for kind in range(len(SUBJECTS))]

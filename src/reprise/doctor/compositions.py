"""Random compositions of batches: requests whose answers are known to the bit come and go, and get
those answers whatever is computed beside them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from reprise.engine.completion import CompletionGroup
from reprise.llm import LLM
from reprise.logprobs import WholeLogprobs
from reprise.sampling_params import WHOLE_VOCABULARY, SamplingParams
from reprise.step import Step

WRONG_AT_MOST = 20
"""Differences after which a run ends."""


_DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 1.3, "min_p": 0.02},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"temperature": 0.8, "logit_bias": {5: 6.0, 7: -100.0}, "min_tokens": 3, "stop_token_ids": [5]},
    {"temperature": 0.7, "allowed_token_ids": range(3, 60, 2)},
    {"temperature": 0.0, "prompt_logprobs": WHOLE_VOCABULARY},
)
_CROWDS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
"""Requests at once: below, at and above where kernels are chosen by the number of rows."""


class Subject(NamedTuple):
    """A request."""

    prompt: list[int]
    params: SamplingParams


class Answer(NamedTuple):
    """What a request got."""

    tokens: list[int]
    logprobs: list[Any]
    """Of each token, [V] float32; none if the whole vocabulary's were not asked for."""
    prompt: list[Any]
    """Of each token of the prompt but the first, where asked for."""

    @classmethod
    def of(cls, group: CompletionGroup) -> Answer:
        output = group.output()
        (completion,) = output.outputs
        return cls(
            list(completion.token_ids), _whole(completion.logprobs), _whole(output.prompt_logprobs)
        )

    def differs(self, other: Answer) -> str | None:
        """At which token the other one is different; None: it has the same bits in all that both
        have."""
        pairs = [("the prompt's token", self.prompt, other.prompt)]
        pairs.append(("token", self.logprobs, other.logprobs))
        for what, all_mine, all_its in pairs:
            for number, (mine, its) in enumerate(zip(all_mine, all_its, strict=False)):
                if not np.array_equal(mine.view(np.int32), its.view(np.int32)):
                    largest = np.abs(mine - its).max()
                    return f"the log probabilities of {what} {number} differ by up to {largest:.3g}"
        return None if self.tokens == other.tokens else "tokens differ"


def _whole(entries: Sequence[Any] | None) -> list[Any]:
    return [each.parts[1] for each in entries or () if isinstance(each, WholeLogprobs)]


@dataclass
class Found:
    """What a run has seen."""

    steps: int = 0
    compositions: set[Hashable] = field(default_factory=set)
    """Steps that differ in what their requests are, how far they have come, or how many tokens of
    which are computed."""
    requests: int = 0
    """Requests that were compared from their first token to their last."""
    rows: set[int] = field(default_factory=set)
    """Numbers of requests that steps have had."""
    tokens: set[int] = field(default_factory=set)
    """Numbers of tokens that steps have had."""
    cached: set[int] = field(default_factory=set)
    """How many tokens of a prompt were found computed; 0 is left out."""
    preempted: int = 0
    """Requests that lost their blocks once or more."""
    drafted: int = 0
    """Steps that verified drafts."""
    wrong: list[str] = field(default_factory=list)

    def compare(
        self, number: int, subject: Subject, expected: Answer, group: CompletionGroup
    ) -> None:
        """Take in what subject ``number`` got."""
        self.requests += 1
        metrics = group.output().metrics
        if metrics.num_cached_tokens:
            self.cached.add(metrics.num_cached_tokens)
        self.preempted += bool(metrics.num_preemptions)
        reason = expected.differs(Answer.of(group))
        if reason is not None:
            tokens = len(subject.prompt)
            self.wrong.append(f"request {number} ({tokens} tokens of prompt): {reason}")

    def __str__(self) -> str:
        return (
            f"{len(self.compositions)} compositions in {self.steps} steps of {min(self.rows)} to "
            f"{max(self.rows)} requests and {max(self.tokens)} tokens at most, {self.requests} "
            f"requests compared, prefixes of {len(self.cached)} lengths found, {self.preempted} "
            f"preempted, {self.drafted} steps with drafts, {len(self.wrong)} wrong"
        )


def make_subjects(vocab_size: int, longest: int, count: int, seed: int = 0) -> list[Subject]:
    """Requests of all kinds: short and long ones, beginnings that several share, texts that repeat
    themselves, so that drafts count; greedy, drawn, and with all that changes logits.

    Args:
        vocab_size: Of the model.
        longest: Tokens of a prompt and its answer at most; at least 48.
        count: Requests.
        seed: Of all that is random.
    """
    chance = random.Random(seed)

    def ids(number: int) -> list[int]:
        return [chance.randrange(vocab_size) for _ in range(number)]

    shared = ids(longest // 3)
    found = []
    for number in range(count):
        tokens = chance.randint(4, 16)
        room = longest - tokens
        prompt = ids(chance.randint(1, chance.choice((8, room // 2, room))))
        if number % 3 == 1:
            prompt = [*shared[: chance.randint(1, len(shared))], *prompt]
        elif number % 3 == 2:
            prompt = prompt[: chance.randint(1, 6)] * room
        draw = _DRAWS[number % len(_DRAWS)]
        params = SamplingParams(
            **draw, seed=number, max_tokens=tokens, ignore_eos=True, detokenize=False,
            logprobs=WHOLE_VOCABULARY,
        )  # fmt: skip
        found.append(Subject(prompt[:room], params))
    return found


def asked(subject: Subject, chance: random.Random) -> tuple[dict[str, Any], SamplingParams]:
    """The prompt and parameters of a request for the same tokens, and for more or less of what must
    not change them: log probabilities, drafts, which prefixes may be shared."""
    prompt, params = subject
    logprobs = chance.choice((WHOLE_VOCABULARY, WHOLE_VOCABULARY, WHOLE_VOCABULARY, 3, None))
    changed = dataclasses.replace(
        params, logprobs=logprobs, num_drafts=chance.choice((None, None, 0, 1)),
        skip_reading_prefix_cache=chance.random() < 0.1,
    )  # fmt: skip
    salt = chance.choice((None, None, None, "one", "two"))
    return {"prompt_token_ids": prompt, "cache_salt": salt}, changed


def alone(llm: LLM, subjects: Sequence[Subject]) -> list[Answer]:
    """What each gets from an engine that has nothing else to do."""
    found = []
    for number, (prompt, params) in enumerate(subjects):
        group = llm.engine.add(f"alone {number}", {"prompt_token_ids": prompt}, params)
        while llm.engine.has_work:
            llm.engine.step()
        found.append(Answer.of(group))
    return found


def run(
    llm: LLM, subjects: Sequence[Subject], expected: Sequence[Answer], count: int, seed: int = 0
) -> Found:
    """Compute random batches until there were ``count`` compositions, and compare all that ends.

    Requests come at random times, more of them and fewer by turns, up to numbers at which kernels
    change; some are more urgent, and some are given up.

    Args:
        llm: Whose batches they are.
        subjects: What requests are drawn from.
        expected: The answer of each.
        count: Compositions.
        seed: Of what comes when.
    """
    chance, found, engine = random.Random(seed), Found(), llm.engine
    most = engine.config.max_num_seqs
    under_way: dict[str, tuple[int, CompletionGroup]] = {}
    known: dict[str, tuple[int, CompletionGroup]] = {}
    """Requests under way, and aborted ones that a step under way may still compute."""
    by_row: dict[int, str] = {}
    submit = engine.runner.submit

    def noting(step: Step, *args: Any, **kwargs: Any) -> None:
        for each in step.admitted:
            by_row[each.row] = each.request_id
        found.steps += 1
        found.rows.add(len(step.rows))
        found.tokens.add(step.num_tokens)
        found.drafted += any(step.drafts)
        members = []
        for row, tokens, drafts in zip(step.rows, step.counts, step.drafts, strict=True):
            number, group = known[by_row[row]]
            done = len(group.completions[0].request.output_token_ids)
            members.append((number, done, tokens, drafts))
        found.compositions.add(tuple(members))
        submit(step, *args, **kwargs)

    vars(engine.runner)["submit"] = noting
    try:
        crowds = [each for each in _CROWDS if each < most] + [most, most + 2]
        crowd, at_once, names = most, True, itertools.count()
        while (more := len(found.compositions) < count) or under_way:
            if chance.random() < 0.05:
                crowd, at_once = chance.choice(crowds), chance.random() < 0.5
            while more and len(under_way) < crowd:
                if under_way and not at_once and chance.random() < 0.4:
                    break
                number = chance.randrange(len(subjects))
                name = f"{next(names)}"
                group = engine.add(name, *asked(subjects[number], chance), chance.randrange(3))
                under_way[name] = known[name] = number, group
            if more and chance.random() < 0.02:
                given_up = chance.choice(list(under_way))
                engine.abort([given_up])
                del under_way[given_up]
            engine.step()
            ended = [name for name, (_, group) in under_way.items() if group.finished]
            for name in ended:
                number, group = under_way.pop(name)
                found.compare(number, subjects[number], expected[number], group)
            if len(found.wrong) >= WRONG_AT_MOST:
                engine.abort(list(under_way))
                break
        while engine.has_work:
            engine.step()
    finally:
        del vars(engine.runner)["submit"]
    return found

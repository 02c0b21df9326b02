"""What a run must take at least: bytes over bandwidth and operations over rate, step by step."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from reprise.bench.experts import expected_hits
from reprise.bench.floor import Floor, size
from reprise.cache import Lifetime
from reprise.engine import Engine
from reprise.garbage import uncollected
from reprise.layers import CausalLM, Linear, SelfAttention, Stack
from reprise.step import Step


@dataclass(frozen=True)
class Work:
    """What a device must move and compute, at least."""

    weight_bytes: float = 0.0
    """Read."""
    cache_bytes: float = 0.0
    """Read and written."""
    operations: float = 0.0
    """Multiplications and additions of matrix products and of attention."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.operations + other.operations,
        )

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def seconds(self, floor: Floor) -> float:
        """Seconds on such a device, if bytes are moved while operations are computed."""
        by_bytes = self.total_bytes / floor.bytes_per_second
        return max(by_bytes, self.operations / floor.matmul_flops_per_second)


@dataclass(frozen=True)
class Chunk:
    """What one request computes in one step."""

    start: int
    """Tokens that it has before."""
    new: int
    """Tokens computed."""
    sampled: int
    """Of them, those behind which a token is drawn: rows of logits."""


@dataclass
class _Experts:
    """Products of which a row takes some."""

    bytes: int
    """Of one expert."""
    operations: int
    """Of one row in one expert."""
    count: int
    top: int

    def hit(self, rows: int) -> float:
        """Experts that so many rows need, if each takes any as likely as any other."""
        return expected_hits(self.count, self.top, rows)


class ModelWork:
    """Counts the work of a model.

    Weights count by the bytes that their format has, once a step; of experts those that are hit.
    Each token of a cache that a request's new tokens see counts once a step. Activations and small
    vectors beside them are left out: they could stay in a cache of the device.

    Args:
        model: What is run.
    """

    def __init__(self, model: CausalLM) -> None:
        self._caches = Counter(
            (each.lifetime, each.token_bytes) for each in model.caches().values()
        )
        self._mixers = Counter(
            (each.sliding_window, each.num_heads * each.head_size)
            for each in model.modules()
            if isinstance(each, SelfAttention)
        )
        head = model.lm_head
        self._head_bytes = size(head.tensors.values())
        self._head_operations = 2 * head.in_features * head.out_features
        products = [e for e in model.modules() if isinstance(e, Linear) and e is not head]
        self._operations = sum(2 * each.in_features * each.out_features for each in products)
        self._experts = list(_experts(model))
        stacks = [each for each in model.modules() if isinstance(each, Stack)]
        apart = {
            id(tensor)
            for each in (*stacks, head, model.model.embed_tokens)
            for tensor in each.parameters()
        }
        self._bytes = size(each for each in model.parameters() if id(each) not in apart)

    def step(self, chunks: Sequence[Chunk]) -> Work:
        """The work of one step in which these requests take part."""
        rows = sum(each.new for each in chunks)
        sampled = sum(each.sampled for each in chunks)
        work = self.products(rows, sampled)
        return sum(map(self.request, chunks), work)

    def products(self, rows: int, sampled: int) -> Work:
        """The work of the matrix products of so many tokens, and of so many rows of logits."""
        nbytes: float = self._bytes + (self._head_bytes if sampled else 0)
        operations = rows * self._operations + sampled * self._head_operations
        for each in self._experts:
            nbytes += each.bytes * each.hit(rows)
            operations += rows * each.top * each.operations
        return Work(weight_bytes=nbytes, operations=operations)

    def request(self, chunk: Chunk) -> Work:
        """The work of one request's caches."""
        nbytes = operations = 0.0
        for (lifetime, token_bytes), count in self._caches.items():
            nbytes += count * _cache_bytes(lifetime, token_bytes, chunk)
        for (window, width), count in self._mixers.items():
            operations += count * 4.0 * width * _pairs(window, chunk)
        return Work(cache_bytes=nbytes, operations=operations)


def _cache_bytes(lifetime: Lifetime, token_bytes: float, chunk: Chunk) -> float:
    """Bytes of the rows that a request's chunk reads and writes."""
    if lifetime.rewritten:
        return 2 * token_bytes
    length = chunk.start + chunk.new
    # The first of the new tokens sees furthest back.
    seen = min(length, lifetime.lasting(length) + chunk.new - 1)
    return token_bytes * (seen + chunk.new)


def _pairs(window: int, chunk: Chunk) -> int:
    """How many pairs of a new token and one that it sees there are; ``window``: how many it sees at
    most, 0: all."""
    length = chunk.start + chunk.new
    pairs = _triangle(length) - _triangle(chunk.start)
    if window:
        # Of position p the p + 1 - window tokens that have left.
        pairs -= _triangle(max(0, length - window)) - _triangle(max(0, chunk.start - window))
    return pairs


def _triangle(n: int) -> int:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2


def _experts(model: CausalLM) -> Iterator[_Experts]:
    for module in model.modules():
        routing = getattr(module, "routing", None)
        stacks = [each for each in module.modules() if isinstance(each, Stack)]
        if routing is None or not stacks:
            continue
        for each in stacks:
            nbytes = size(each.tensors.values()) // each.count
            operations = 2 * each.in_features * each.out_features
            yield _Experts(nbytes, operations, routing.experts, routing.top)


# ---- the schedule --------------------------------------------------------------------------


@dataclass
class Schedule:
    """The steps of a run as the runner got them."""

    steps: list[list[Chunk]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each was submitted, in seconds."""
    last_admission: int = 0
    """The step in which no request was left to wait."""
    most_waiting: int = 0
    """The most requests that waited behind a step which had tokens left for more: for room in the
    cache, or for a place among those that compute at the same time."""
    _computed: dict[int, int] = field(default_factory=dict)

    def note(self, step: Step, known: Sequence[int], waiting: int, budget: int) -> None:
        """Take note of one more step.

        Args:
            step: Which.
            known: Tokens of each of its requests, as far as the host knows. Only where drafts are
                under way is that how one can tell where a request stands.
            waiting: Requests that take no part and are not finished.
            budget: Tokens that a step can have.
        """
        if not step.rows:
            return
        if step.num_tokens < budget:
            self.most_waiting = max(self.most_waiting, waiting)
        for each in step.admitted:
            self._computed[each.row] = each.start
            self.last_admission = len(self.steps)
        chunks = []
        for number, row in enumerate(step.rows):
            drafts, start = step.drafts[number], self._computed[row]
            if number < step.num_decodes and any(step.drafts):
                start = known[number] - 1
            new = step.counts[number] + drafts
            chunks.append(Chunk(start, new, (1 + drafts) * step.samples[number]))
            self._computed[row] = start + new
        self.steps.append(chunks)
        self.times.append(time.perf_counter())

    def tail(self, ended: float) -> float:
        """Seconds before ``ended`` in which no request waited and at most half as many requests as
        before were left to run."""
        most = max(map(len, self.steps), default=0)
        for chunks, began in zip(self.steps, self.times, strict=True):
            last = began >= self.times[self.last_admission]
            if last and 2 * len(chunks) <= most:
                return ended - began
        return 0.0


@contextlib.contextmanager
def scheduled(engine: Engine) -> Iterator[Schedule]:
    """What the engine computes in the ``with`` block, which begins with an idle one."""
    runner, found = engine.runner, Schedule()
    submit = runner.submit

    def noted(step: Step, *args: Any) -> None:
        scheduler = engine.scheduler
        known = [each.num_tokens for each in scheduler.requests_of(step)]
        waiting = scheduler.stats().num_waiting
        found.note(step, known, waiting, scheduler.max_num_batched_tokens)
        submit(step, *args)

    runner.submit = noted  # type: ignore[assignment, method-assign]
    try:
        # A run brings Python to look for garbage only by what is noted here.
        with uncollected():
            yield found
    finally:
        del runner.submit


@dataclass(frozen=True)
class Bounds:
    """Seconds that a run cannot be below."""

    of_schedule: float
    """Its steps, one after the other, each at the device's best."""
    of_any: float
    """Whatever is computed together with what."""
    work: Work
    """Of the schedule."""


def bounds(
    model: ModelWork,
    schedule: Schedule,
    inputs: Sequence[int],
    outputs: Sequence[int],
    floor: Floor,
    width: int = 1,
) -> Bounds:
    """The bounds of a run.

    Args:
        model: What is run.
        schedule: The steps that it was run in.
        inputs: Tokens of each prompt that had to be computed.
        outputs: Tokens that are generated of each.
        floor: What the device can do, measured in the same run.
        width: Most tokens of a request that a step can bring.
    """
    works = [model.step(each) for each in schedule.steps]
    return Bounds(
        of_schedule=sum(each.seconds(floor) for each in works),
        of_any=_unmovable(model, inputs, outputs, floor, width),
        work=sum(works, Work()),
    )


def _unmovable(
    model: ModelWork, inputs: Sequence[int], outputs: Sequence[int], floor: Floor, width: int
) -> float:
    """All bytes over bandwidth, and behind it the operations of all prompts over the rate.

    Steps of one request come one after the other, so weights are read as often as the longest
    output has steps, by all requests at once. Each step reads its request's cache.
    """
    moved = computed = Work()
    for begin in range(0, max(outputs, default=0), width):
        rows = sum(each > begin for each in outputs)
        moved += model.products(rows, rows)
    for prompt, output in zip(inputs, outputs, strict=True):
        first = Chunk(0, prompt, 1)
        computed += model.products(prompt, 1) + model.request(first)
        for begin in range(1, output, width):
            moved += model.request(Chunk(prompt + begin - 1, 1, 1))
    nbytes = moved.total_bytes + computed.cache_bytes
    by_bytes = nbytes / floor.bytes_per_second
    return by_bytes + computed.operations / floor.matmul_flops_per_second

"""Replicas that share experts: each computes its own requests, in steps of the same shape, and
every request gets the tokens that one engine gives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import TinyModels, greedy, need_devices, random_ids
from http_server import gone, replicas_of

from reprise import LLM, AsyncLLM, SamplingParams
from reprise.engine.questions import QUESTIONS
from reprise.errors import ModelError, RanksError, RepriseError, RequestError
from reprise.replicas import table
from reprise.replicas.launch import LocalFleet

ANSWER_SECONDS = 10.0
LENGTHS = (1, 3, 9, 30, 47, 70)
"""Of prompts: within a bucket of mixed steps, of several chunks, and of one token."""
MOST = 24
ENDLESS = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "num_blocks": 130, "dtype": "float32", "max_num_seqs": 6, "max_num_batched_tokens": 48,
    "graph_buckets": "decode=2,6;mixed=32", "skip_tokenizer_init": True,
}  # fmt: skip
"""Some steps are larger than any bucket."""


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where logs of replicas go that are lost: they stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("replicas")))
        yield


@pytest.fixture(scope="module")
def options(tiny: TinyModels, device: str) -> dict[str, Any]:
    need_devices(device, 2)
    return {**OPTIONS, "model": str(tiny("qwen3_moe").path), "device": device}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_ids(60 + number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(options: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    with LLM(**options, graph_mode="none") as llm:
        return tokens(llm, prompts)


@pytest.fixture(scope="module")
def pair(options: dict[str, Any], expected: Any) -> Iterator[LLM]:
    with together(options, graph_mode="full") as llm:
        yield llm


def together(options: dict[str, Any], **more: Any) -> LLM:
    asked = {**options, "data_parallel_size": 2, "enable_expert_parallel": True, **more}
    need_devices(asked["device"], ranks_in(asked))
    return LLM(**asked)


def ranks_in(options: dict[str, Any]) -> int:
    return int(options.get("data_parallel_size", 2) * options.get("tensor_parallel_size", 1))


def tokens(llm: LLM, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """Greedy ones, unless ``params`` say otherwise."""
    asked = SamplingParams(**{"temperature": 0, "max_tokens": MOST, "ignore_eos": True, **params})
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    return [each.outputs[0].token_ids for each in outputs]


def processes(llm: LLM) -> list[int]:
    """Of each replica."""
    replicas: Any = llm._batch.replicas._replicas  # type: ignore[attr-defined]
    return [each._child.process.pid for each in replicas]


def until_lost(llm: LLM, prompts: list[list[int]]) -> None:
    for _ in range(1000):
        llm.generate(prompts, ENDLESS, use_tqdm=False)


def metric(llm: LLM, name: str) -> dict[str, float]:
    """By engine."""
    return {
        each.labels["engine"]: each.value  # type: ignore[attr-defined]
        for each in llm.get_metrics()
        if each.name == f"reprise:{name}"
    }


@contextlib.contextmanager
def all_to(driver: Any, chosen: int) -> Iterator[None]:
    """Requests go to one replica, whatever the router would say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(driver.router), "choose", _chooser(driver, lambda: chosen))
        yield


def _chooser(driver: Any, choose: Any) -> Any:
    inner = type(driver.router).choose

    def other(self: Any, *what: Any) -> Any:
        route = inner(self, *what)
        wanted = choose()
        cost = route.prompt_tokens + route.output_tokens
        self.loads[route.replica] -= cost
        self.loads[wanted] += cost
        route.replica = wanted
        return route

    return other


def test_one_is_busy_and_one_idle(
    pair: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """The idle one computes padding alone, in graphs of the other one's size."""
    for busy in (0, 1):
        before = metric(pair, "lockstep_empty_steps")
        with all_to(pair._batch.replicas, busy):
            assert tokens(pair, prompts) == expected
        empty = metric(pair, "lockstep_empty_steps")
        idle, other = str(1 - busy), str(busy)
        assert empty[idle] - before[idle] >= MOST
        assert empty[other] == before[other]

    def are_used() -> bool:
        graphs = pair.graph_report().graphs
        counts = (
            sum(each.replays for each in graphs if each.phase == phase)
            for phase in ("decode", "mixed")
        )
        return all(count >= least for count, least in zip(counts, (MOST, 1), strict=True))

    # When a kind of step is proven depends on how long a comparison takes.
    assert are_used() or any(tokens(pair, prompts) == expected and are_used() for _ in range(20))
    assert not pair.graph_report().quarantined


def test_both_are_busy(pair: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """With different things: prompts here and decodes there."""
    for _ in range(2):
        assert tokens(pair, prompts * 2) == expected * 2
    drawn = tokens(pair, prompts[:3], temperature=0.9, seed=5)
    assert tokens(pair, prompts[2::-1], temperature=0.9, seed=5) == drawn[::-1]


def test_weights_are_not_replaced(pair: LLM) -> None:
    with pytest.raises(RequestError, match="update_weights where several ranks"):
        pair.update_weights({})


def test_a_killed_replica_is_named(pair: LLM, prompts: list[list[int]]) -> None:
    """The other one waits for it in a step, and is not blamed."""
    children = processes(pair)
    threading.Timer(0.3, os.kill, (children[1], signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(RepriseError, match=r"replica 1 \(.*, process .* by signal 9 \(SIGKILL\)"):
        until_lost(pair, prompts)
    assert time.monotonic() - began < ANSWER_SECONDS
    pair.shutdown()
    assert all(gone(each) for each in children)


def test_a_killed_replica_is_named_where_the_system_says_so_late() -> None:
    """Its connections close first, and who has lost them may have ended by then."""

    class One:
        def __init__(self, number: int, killed_at_look: int) -> None:
            self.number, self.looks, self.killed_at_look = number, 0, killed_at_look

        @property
        def was_killed(self) -> bool:
            self.looks += 1
            return self.looks >= self.killed_at_look

        def ended(self) -> str:
            return f"replica {self.number}"

    fleet = object.__new__(LocalFleet)
    fleet._table = SimpleNamespace(first_failure=None)  # type: ignore[assignment]
    survivor, killed = One(0, 1 << 62), One(1, 5)
    fleet.replicas = [survivor, killed]  # type: ignore[list-item]
    assert fleet.ended(survivor) == "replica 1"  # type: ignore[arg-type]
    fleet.replicas = [survivor]  # type: ignore[list-item]
    assert fleet.ended(survivor) == "replica 0"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "ranks", "told"),
    [
        ("qwen3", 2, "Qwen3ForCausalLM has no experts"),
        ("qwen3_moe", 3, "3 ranks do not divide 8 experts"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    tiny: TinyModels, options: dict[str, Any], model: str, ranks: int, told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        together(options, model=str(tiny(model).path), data_parallel_size=ranks)


# ---- everything --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("executor", "steps", "more"),
    [
        ("full", 2000, {}),
        ("breakable", 2000, {}),
        ("none", 500, {}),
        ("full", 500, {"graph_verify": "off"}),
        ("full", 500, {"graph_verify": "canary:1"}),
        ("full", 500, {"num_blocks": 10, "max_model_len": 96}),
        ("full", 500, {"data_parallel_size": 4}),
        ("full", 2000, {"tensor_parallel_size": 2}),
        ("full", 500, {"ops": {"dispatch": "all_to_all", "combine": "all_to_all"}}),
        ("breakable", 300, {"data_parallel_size": 4, "ops": {"dispatch": "all_to_all"}}),
        ("full", 500, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3,
                       "prompt_lookup_max": 3, "prompt_lookup_min": 1}}),
    ],
    ids=["full", "breakable", "none", "unverified", "every step compared", "preemption", "four",
         "two ranks each", "rows to their experts", "there and not back", "drafts"],
)  # fmt: skip
def test_random_steps(
    options: dict[str, Any], prompts: list[list[int]], expected: list[list[int]], executor: str,
    steps: int, more: dict[str, Any],
) -> None:  # fmt: skip
    random_steps({**options, "graph_mode": executor, **more}, prompts, expected, steps)


def random_steps(
    options: dict[str, Any], prompts: list[list[int]], expected: list[list[int]], steps: int
) -> None:
    """Requests come and go at any step of others, to one replica, to all, to none for a while."""
    need_devices(options["device"], ranks_in(options))
    executor, count = options["graph_mode"], options.get("data_parallel_size", 2)
    chosen = {name: each for name, each in options.items() if name not in ("model", "device")}
    rng = random.Random(str(chosen))

    async def main(llm: AsyncLLM) -> None:
        names = iter(range(1 << 30))

        async def ask(news: asyncio.Event) -> None:
            which, most = rng.randrange(len(prompts)), rng.randint(1, MOST)
            left = rng.random() < 0.1
            params = greedy(most, ignore_eos=True)
            found: list[int] = []
            async for each in llm.generate(prompts[which], params, f"{next(names)}"):
                found = each.outputs[0].token_ids
                news.set()
                if left and len(found) > 2:
                    return  # its reader leaves
            assert found == expected[which][:most]

        async def total() -> int:
            found = await llm.get_metrics()
            return max(int(each.value) for each in found
                       if each.name == "reprise:lockstep_meetings")  # fmt: skip

        waiting: set[asyncio.Task[None]] = set()
        with pytest.MonkeyPatch.context() as patch:
            pinned: list[int] = list(range(count))
            driver: Any = llm._driver
            patch.setattr(
                type(driver.router), "choose", _chooser(driver, lambda: rng.choice(pinned))
            )
            while await total() < steps:
                pinned = rng.choice([[0], [1], [count - 1], list(range(count))])
                news = asyncio.Event()
                for _ in range(rng.randint(1, 8)):
                    waiting.add(asyncio.create_task(ask(news)))
                if rng.random() < 0.3:
                    await asyncio.gather(*waiting)  # all are idle then
                    waiting.clear()
                else:  # others come while these are computed
                    await news.wait()
                    done = {each for each in waiting if each.done()}
                    await asyncio.gather(*done)
                    waiting -= done
            await asyncio.gather(*waiting)
        reports = await asyncio.wrap_future(driver.ask("graph_report"))
        report = QUESTIONS["graph_report"].of_all(reports)
        assert not report.quarantined
        if executor != "none":
            # How many wait for their kind to be proven depends on what a comparison takes.
            assert report.replays > (steps if "graph_verify" in options else 0)
        stats = await llm.stats()
        assert stats.num_requests == 0
        if options["num_blocks"] < OPTIONS["num_blocks"]:
            assert stats.scheduler.total_preemptions > 0
        if method := options.get("speculative_config", {}).get("method"):
            assert stats.drafts.drafted > 0, method

    llm = AsyncLLM(
        **{"data_parallel_size": count, "enable_expert_parallel": True, **options}
    )  # fmt: skip
    try:
        asyncio.run(main(llm))
    finally:
        llm.shutdown()


# ---- faults ------------------------------------------------------------------------------


@contextlib.contextmanager
def faulty(name: str) -> Iterator[None]:
    """A fault, by name, in replica 1 of those that are made inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "SETUP", (f"reprise.testing.faults.ranks:{name}",))
        yield


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dies_submitting", "by signal 9"),
        ("dies_drawing", "by signal 9"),
        ("raises_submitting", "this rank alone fails"),
        ("raises_in_a_pass", "this rank alone fails"),
    ],
)
def test_a_replica_that_goes_wrong_is_named(
    options: dict[str, Any], prompts: list[list[int]], name: str, told: str
) -> None:
    with faulty(name):
        llm = together(options, graph_mode="none")
    with all_to(llm._batch.replicas, 0):  # it is idle itself
        began = time.monotonic()
        with pytest.raises(RepriseError, match=rf"(?s)replica 1 \(.*{told}"):
            llm.generate(prompts, ENDLESS, use_tqdm=False)
        assert time.monotonic() - began < ANSWER_SECONDS
    llm.shutdown()
    assert not replicas_of(os.getpid())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("dies_loading", RepriseError, r"replica 1 \(.* by signal 9"),
        ("dies_capturing", RepriseError, r"replica 1 \(.* by signal 9"),
        ("is_unlike", RanksError, "the ranks are not alike"),
    ],
)
def test_a_replica_that_does_not_start_is_named(
    options: dict[str, Any], name: str, kind: type[Exception], told: str
) -> None:
    with faulty(name), pytest.raises(kind, match=told):
        together(options, graph_mode="full")
    assert not replicas_of(os.getpid())


@pytest.mark.long
@pytest.mark.parametrize("name", ["captures_stale", "is_slow"])
def test_a_fault_that_costs_no_token(
    options: dict[str, Any], prompts: list[list[int]], expected: list[list[int]], name: str
) -> None:
    """A graph that is wrong on one replica runs on none; a slow one is waited for."""
    with faulty(name), together(options, graph_mode="full") as llm:
        assert tokens(llm, prompts) == expected
        report = llm.graph_report()
        if name == "captures_stale":
            assert report.quarantined
            assert not any(each.replays for each in report.graphs if each.executor == "full")
        else:
            assert not report.quarantined


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_whoever_waits_is_told_in_time(
    options: dict[str, Any], prompts: list[list[int]], kind: int
) -> None:
    """At any moment: idle, in the midst of steps, of either."""
    rng = random.Random(int(kind))
    for _ in range(10):
        llm = together(options, graph_mode="full")
        children = processes(llm)
        chosen = rng.randrange(2)
        llm.generate(prompts, greedy(rng.randint(1, 5)), use_tqdm=False)
        threading.Timer(rng.uniform(0, 0.5), os.kill, (children[chosen], kind)).start()
        began = time.monotonic()
        with pytest.raises(RepriseError, match=rf"replica {chosen} \("):
            until_lost(llm, prompts)
        assert time.monotonic() - began < ANSWER_SECONDS
        llm.shutdown()
        assert all(gone(each) for each in children)

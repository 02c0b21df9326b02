"""Replicas of two ranks each that share experts: every process has experts of its own, attention is
shared by the ranks of a replica."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import TinyModels, greedy, need_devices, random_ids
from http_server import children, gone, replicas_of
from test_shared_experts import (
    ANSWER_SECONDS,
    ENDLESS,
    LENGTHS,
    MOST,
    OPTIONS,
    all_to,
    faulty,
    metric,
    processes,
    together,
    tokens,
    until_lost,
)

from reprise import LLM
from reprise.errors import ModelError, RepriseError

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

LEAVE_SECONDS = 10.0


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where logs of replicas go that are lost: they stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("replicas")))
        yield


@pytest.fixture(scope="module")
def options(tiny: TinyModels, device: str) -> dict[str, Any]:
    need_devices(device, 4)
    model = str(tiny("qwen3_moe").path)
    return {**OPTIONS, "model": model, "device": device, "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_ids(60 + number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(options: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    with LLM(**{**options, "tensor_parallel_size": 1}, graph_mode="none") as llm:
        return tokens(llm, prompts)


def ranks_of(llm: LLM) -> list[list[int]]:
    """Processes of each replica, by rank."""
    return [
        [pid, *(number for number, command in children(pid) if "reprise.follower" in command)]
        for pid in processes(llm)
    ]


def all_are_gone(ranks: list[list[int]]) -> bool:
    """Followers end when they hear nothing more from their leaders, a moment later."""
    until = time.monotonic() + LEAVE_SECONDS
    left = [each for mine in ranks for each in mine]
    while left and time.monotonic() < until:
        left = [each for each in left if not gone(each)]
        time.sleep(0.05)
    return not left


@pytest.mark.parametrize("executor", ["full", "breakable", "none"])
def test_same_tokens(
    options: dict[str, Any], prompts: list[list[int]], expected: list[list[int]], executor: str
) -> None:
    """One is busy and one idle, then both are, with different things."""
    with together(options, graph_mode=executor) as llm:
        ranks = ranks_of(llm)
        assert [len(each) for each in ranks] == [2, 2]
        for busy in (0, 1):
            before = metric(llm, "lockstep_empty_steps")
            with all_to(llm._batch.replicas, busy):
                assert tokens(llm, prompts) == expected
            empty = metric(llm, "lockstep_empty_steps")
            assert empty[str(1 - busy)] - before[str(1 - busy)] >= MOST
        for _ in range(2):
            assert tokens(llm, prompts * 2) == expected * 2
        drawn = tokens(llm, prompts[:3], temperature=0.9, seed=5)
        assert tokens(llm, prompts[2::-1], temperature=0.9, seed=5) == drawn[::-1]
        report = llm.graph_report()
        assert not report.quarantined
        for phase in ("decode", "mixed"):
            replays = sum(each.replays for each in report.graphs if each.phase == phase)
            assert (replays > 0) == (executor != "none")
    assert all_are_gone(ranks)


def test_experts_that_so_many_ranks_do_not_divide_are_refused(
    tiny: TinyModels, options: dict[str, Any]
) -> None:
    model = str(tiny("qwen3_moe", num_experts=6).path)
    with pytest.raises(ModelError, match="4 ranks do not divide 6 experts"):
        together(options, model=model)


def test_a_rank_that_raises_is_named(options: dict[str, Any], prompts: list[list[int]]) -> None:
    """Ranks of the other replica wait for it, and so does its leader; none of them is blamed."""
    with faulty("follower_raises"):
        llm = together(options, graph_mode="none")
    ranks = ranks_of(llm)
    with all_to(llm._batch.replicas, 0):
        began = time.monotonic()
        with pytest.raises(RepriseError, match=r"(?s)replica 1 \(.*this rank alone fails"):
            llm.generate(prompts, ENDLESS, use_tqdm=False)
        assert time.monotonic() - began < ANSWER_SECONDS
    llm.shutdown()
    assert all_are_gone(ranks)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("moment", range(5))
def test_whoever_waits_is_told_in_time(
    options: dict[str, Any], prompts: list[list[int]], kind: int, moment: int
) -> None:
    """At any moment, of any process."""
    rng = random.Random(10 * moment + int(kind))
    llm = together(options, graph_mode=rng.choice(("full", "breakable", "none")))
    ranks = ranks_of(llm)
    replica, rank = rng.randrange(2), (moment + 1) % 2
    told = rf"(?s)replica {replica} \(" + r".*rank 1 \(process" * rank
    llm.generate(prompts, greedy(rng.randint(1, 5)), use_tqdm=False)
    lost = threading.Timer(rng.uniform(0, 0.5), os.kill, (ranks[replica][rank], kind))
    lost.start()
    began = time.monotonic()
    with pytest.raises(RepriseError, match=told):
        until_lost(llm, prompts)
    assert time.monotonic() - began < ANSWER_SECONDS
    lost.join()
    llm.shutdown()
    assert all_are_gone(ranks)


@pytest.mark.parametrize("lost", [0, 1])
def test_replicas_that_share_nothing(
    tiny: TinyModels, options: dict[str, Any], prompts: list[list[int]], lost: int
) -> None:
    """Each of two ranks: tokens are those of one engine, and a process that ends is named."""
    alike = {**options, "model": str(tiny("qwen3").path), "graph_mode": "full"}
    with LLM(**{**alike, "tensor_parallel_size": 1}) as llm:
        expected = tokens(llm, prompts)
    llm = LLM(**alike, data_parallel_size=2)
    ranks = ranks_of(llm)
    assert [len(each) for each in ranks] == [2, 2]
    for busy in (0, 1):
        with all_to(llm._batch.replicas, busy):
            assert tokens(llm, prompts) == expected
    assert tokens(llm, prompts * 2) == expected * 2
    assert not llm.graph_report().quarantined
    os.kill(ranks[1][lost], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RepriseError, match=r"(?s)replica 1 \(.*" + "rank 1 .*its log: /" * lost):
        until_lost(llm, prompts)
    assert time.monotonic() - began < ANSWER_SECONDS
    llm.shutdown()
    assert all_are_gone(ranks)


PROGRAM = """
import json, sys
from reprise import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]), data_parallel_size=2, enable_expert_parallel=True)
print("ready", flush=True)
params = SamplingParams(max_tokens=150, ignore_eos=True)
while True:
    llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 4, params, use_tqdm=False)
"""


def test_a_program_that_is_killed_leaves_nothing(options: dict[str, Any]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(options)], stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert "ready\n" in iter(program.stdout.readline, "")
        ranks = [
            [pid, *(number for number, _ in children(pid))] for pid in replicas_of(program.pid)
        ]
        assert [len(each) for each in ranks] == [2, 2]
        program.kill()
    assert all_are_gone(ranks)

"""Ranks and replicas as actors of a Ray cluster whose nodes are all on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import TinyModels, random_ids, token_ids
from http_server import gone

from reprise import LLM, AsyncLLM, SamplingParams
from reprise.errors import ConfigError, OpError, RepriseError
from reprise.parallel.followers import SILENT_SECONDS

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'reprise[ray]'")
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ANSWER_SECONDS = 20.0
PROMPTS = ["Once upon a time", "47 + 38 =", "Once upon a time", "The cat", "1, 2, 3,"]
SHORT = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=1800, ignore_eos=True)


class Nodes:
    """A cluster of as many nodes as are wanted, each with room for one rank."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.others: list[Any] = []
        self._add(include_dashboard=False)

    def _add(self, **options: Any) -> Any:
        return self.cluster.add_node(num_cpus=1, **options)

    def want(self, count: int) -> None:
        while len(self.others) + 1 < count:
            self.others.append(self._add())
        while len(self.others) + 1 > count:
            self.kill()

    def replica_to_lose(self, log: str) -> str:
        """Of replicas of one rank, the one on the newest node: which that is, is chance.

        Args:
            log: That says where they were placed.
        """
        from ray._private.state import actors

        newest = self.others[-1].node_id
        there = {str(each["Pid"]) for each in actors().values()
                 if each["Address"]["NodeID"] == newest}  # fmt: skip
        placed = re.findall(r"replica (\d+), rank 0: cpu, process (\d+) on", log)
        (found,) = [replica for replica, process in placed if process in there]
        return str(found)

    def kill(self) -> None:
        """The newest node, with all its processes and at once."""
        self.cluster.remove_node(self.others.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def cluster(device: str) -> Iterator[Nodes]:
    if device != "cpu":
        pytest.skip("these ranks share a CPU")
    nodes = Nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """Two of them, and nobody's actors before and after."""
    cluster.want(2)
    yield cluster
    assert_nothing_is_left()


def assert_nothing_is_left() -> None:
    """No actor lives, and no placement group; what a cluster frees, it frees a little later."""
    if not ray.is_initialized():
        return
    from ray._private.state import actors

    end = time.monotonic() + 60
    while True:
        living = [each for each in actors().values() if each["State"] != "DEAD"]
        groups = ray.util.placement_group_table().values()
        held = [each for each in groups if each["state"] != "REMOVED"]
        if not living and not held:
            return
        assert time.monotonic() < end, (living, held)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def elsewhere(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "distributed_executor_backend": "ray"}


@pytest.fixture(scope="module")
def expected(one: LLM) -> list[Any]:
    return token_ids(one.generate(PROMPTS, SHORT, use_tqdm=False))


def test_ranks_on_two_nodes(
    nodes: Nodes, elsewhere: dict[str, Any], expected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "reprise"), LLM(**elsewhere, tensor_parallel_size=2) as llm:
        for _ in range(2):
            assert token_ids(llm.generate(PROMPTS, SHORT, use_tqdm=False)) == expected
        report = llm.graph_report()
        assert sum(each.replays for each in report.graphs) > 0
        with pytest.raises(ConfigError, match="in a process of its own"):
            _ = llm.engine
        with pytest.raises(RepriseError, match="update_weights with distributed_executor_backend"):
            llm.update_weights([])
    assert "PACK (no node has room for all of its ranks" in caplog.text
    assert "do not end within" not in caplog.text


def test_two_replicas(nodes: Nodes, elsewhere: dict[str, Any], expected: list[Any]) -> None:
    with LLM(**elsewhere, data_parallel_size=2) as llm:
        assert token_ids(llm.generate(PROMPTS, SHORT, use_tqdm=False)) == expected
        assert len(llm.stats().replicas) == 2


def test_two_replicas_of_two_ranks(
    nodes: Nodes, elsewhere: dict[str, Any], expected: list[Any]
) -> None:
    nodes.want(4)
    with LLM(**elsewhere, data_parallel_size=2, tensor_parallel_size=2) as llm:
        assert token_ids(llm.generate(PROMPTS, SHORT, use_tqdm=False)) == expected


@pytest.fixture(scope="module")
def experts(tiny: TinyModels, device: str) -> dict[str, Any]:
    """Of engines that share them; some steps are larger than any bucket."""
    return {
        "model": str(tiny("qwen3_moe").path), "device": device, "num_blocks": 130,
        "dtype": "float32", "graph_mode": "full", "max_num_seqs": 6, "max_num_batched_tokens": 48,
        "graph_buckets": "decode=2,6;mixed=32", "skip_tokenizer_init": True,
    }  # fmt: skip


TEXTS = [random_ids(60 + number, length) for number, length in enumerate((1, 3, 9, 30, 47, 70))]
"""Within a bucket of mixed steps, of several chunks, and of one token."""


@pytest.fixture(scope="module")
def of_one(experts: dict[str, Any]) -> list[Any]:
    with LLM(**{**experts, "graph_mode": "none"}) as llm:
        return token_ids(llm.generate(TEXTS, SHORT, use_tqdm=False))


@pytest.mark.parametrize("ranks", [1, 2])
def test_replicas_that_share_experts(
    nodes: Nodes, experts: dict[str, Any], of_one: list[Any], ranks: int
) -> None:
    """On two nodes, or on four with two ranks each: one busy, then both, then after a rest."""
    nodes.want(2 * ranks)
    with LLM(
        **experts, distributed_executor_backend="ray", data_parallel_size=2,
        tensor_parallel_size=ranks, enable_expert_parallel=True,
    ) as llm:  # fmt: skip
        for pause in (0.0, 0.0, 0.5):
            time.sleep(pause)
            for text, expected in zip(TEXTS, of_one, strict=True):
                assert token_ids(llm.generate([text], SHORT, use_tqdm=False)) == [expected]
            assert token_ids(llm.generate(TEXTS * 2, SHORT, use_tqdm=False)) == of_one * 2
        report = llm.graph_report()
        assert sum(each.replays for each in report.graphs) > 0
        assert not report.quarantined
        empty = [each.value for each in llm.get_metrics() if "lockstep_empty_steps" in each.name]
        assert len(empty) == 2
        assert all(empty), "one computed nothing while the other one was busy"


def until_lost(llm: LLM) -> None:
    for _ in range(1000):
        llm.generate(TEXTS, SHORT, use_tqdm=False)


def test_a_node_with_a_replica_that_shares_experts_is_killed(
    nodes: Nodes, experts: dict[str, Any], of_one: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The other one waits for it in a step or in a collective, and is not blamed."""
    options = {**experts, "data_parallel_size": 2, "enable_expert_parallel": True,
               "distributed_executor_backend": "ray"}  # fmt: skip
    with caplog.at_level("INFO", "reprise"):
        llm = LLM(**options)
    lost = nodes.replica_to_lose(caplog.text)
    threading.Timer(0.5, nodes.kill).start()
    began = time.monotonic()
    with pytest.raises(RepriseError, match=rf"^replica {lost} \(cpu on "):
        until_lost(llm)
    assert time.monotonic() - began < ANSWER_SECONDS
    llm.shutdown()
    nodes.want(2)
    with LLM(**options) as again:
        assert token_ids(again.generate(TEXTS, SHORT, use_tqdm=False)) == of_one


def test_a_node_that_is_killed_while_nobody_asks(nodes: Nodes, elsewhere: dict[str, Any]) -> None:
    with LLM(**elsewhere, tensor_parallel_size=2) as llm:
        nodes.kill()
        began = time.monotonic()
        with pytest.raises(RepriseError, match=r"rank 1 \(process"):
            llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
        assert time.monotonic() - began < ANSWER_SECONDS


@pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=["rank", "replica"]
)
def test_a_node_that_is_killed(
    nodes: Nodes, elsewhere: dict[str, Any], expected: list[Any], sizes: dict[str, int]
) -> None:
    """With a rank of an engine, or with a replica: callers are told, the program goes on."""

    async def main() -> list[BaseException | None]:
        llm = AsyncLLM(**elsewhere, **sizes)
        begun: set[str] = set()
        all_begun = asyncio.Event()

        async def read(name: str) -> None:
            async for _ in llm.generate(name, ENDLESS):
                begun.add(name)
                if len(begun) == 4:
                    all_begun.set()

        readers = [asyncio.create_task(read(f"{each}")) for each in range(4)]
        await all_begun.wait()
        nodes.kill()
        began = time.monotonic()
        ended = await asyncio.gather(*readers, return_exceptions=True)
        assert time.monotonic() - began < ANSWER_SECONDS
        with pytest.raises(RepriseError, match=r"was lost|was ended"):
            await llm.stats()
        llm.shutdown()
        return ended

    for each in asyncio.run(main()):
        assert isinstance(each, RepriseError)
        lost = r"rank 1 \(process" if "tensor_parallel_size" in sizes else r"replica [01] \("
        assert re.search(lost, str(each))
        assert "ray logs actor --id" in str(each)
    nodes.want(2)
    with LLM(**elsewhere, **sizes) as again:
        assert token_ids(again.generate(PROMPTS, SHORT, use_tqdm=False)) == expected


@pytest.mark.parametrize(
    ("rank", "told"),
    [(0, r"replica 0 \(.*has not run for 30 s"), (1, r"rank 1 \(process .*has not run for 30 s")],
    ids=["the first", "another"],
)
def test_a_rank_that_is_stopped(
    nodes: Nodes, elsewhere: dict[str, Any], caplog: pytest.LogCaptureFixture, rank: int, told: str
) -> None:
    """None of its threads runs, and its connections stay: it is silence that tells."""
    with caplog.at_level("INFO", "reprise"):
        llm = LLM(**elsewhere, tensor_parallel_size=2)
    (process,) = re.findall(rf"replica 0, rank {rank}: cpu, process (\d+) on", caplog.text)
    os.kill(int(process), signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RepriseError, match=rf"(?s){told}"):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    assert time.monotonic() - began < SILENT_SECONDS + ANSWER_SECONDS
    llm.shutdown()
    until = time.monotonic() + ANSWER_SECONDS
    while not gone(int(process)):
        assert time.monotonic() < until, "it is stopped still"
        time.sleep(0.1)


def test_what_does_not_start_is_named(nodes: Nodes, elsewhere: dict[str, Any]) -> None:
    """By the error's type, whichever process it is raised in."""
    with pytest.raises(OpError, match=r"replica 0 .*no_such"):
        LLM(**elsewhere, ops={"paged_attention": "no_such"}, tensor_parallel_size=2)


def test_too_few_devices_are_refused(nodes: Nodes, elsewhere: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"has 1 \+ 1 CPU on 2 node\(s\), room for 2"):
        LLM(**elsewhere, tensor_parallel_size=2, data_parallel_size=2)


def test_room_that_others_have_is_waited_for_in_vain(
    nodes: Nodes, elsewhere: dict[str, Any]
) -> None:
    ray.init(address=nodes.cluster.address, ignore_reinit_error=True)
    others = ray.util.placement_group([{"CPU": 1}])
    assert others.wait(60)
    try:
        with pytest.raises(RepriseError, match="longer with distributed_timeout_seconds"):
            LLM(**elsewhere, tensor_parallel_size=2, distributed_timeout_seconds=1)
    finally:
        ray.util.remove_placement_group(others)


PROGRAM = """
import json, sys
from reprise import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]))
print("ready", flush=True)
llm.generate(["a"], SamplingParams(max_tokens=1800, ignore_eos=True), use_tqdm=False)
print("not interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_ends_leaves_nothing(
    nodes: Nodes, elsewhere: dict[str, Any], number: int
) -> None:
    import json

    ray.init(address=nodes.cluster.address, ignore_reinit_error=True)
    options = json.dumps({**elsewhere, "tensor_parallel_size": 2})
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, options], stdout=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as program:  # fmt: skip
        assert program.stdout is not None
        with contextlib.closing(program.stdout):
            assert any(line == "ready\n" for line in program.stdout)
            os.killpg(program.pid, number)
            assert "not interrupted" not in program.stdout.read()
        assert program.wait(120) != 0
    assert_nothing_is_left()

"""A process that is forked has its parent's engines, and must leave them alone."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, need_devices, random_ids

from reprise.errors import RepriseError
from reprise.platforms.cpu import CpuPlatform

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
PROMPT = random_ids(0, 12)


def forked(child: Callable[[], bool]) -> None:
    """Run this in a fork, and see that it is true there."""
    process = os.fork()
    if process == 0:
        status = 2
        try:
            status = 0 if child() else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_is_its_parents(tiny: TinyModels, device: str, ranks: int) -> None:
    """Whatever the child asks for, and however it ends, the parent's goes on."""
    need_devices(device, ranks)
    llm = make_llm(tiny("qwen3"), device, tensor_parallel_size=ranks)
    before = generate(llm, [PROMPT], greedy(4))
    leader = getattr(llm.engine.runner, "_leader", None)

    def child() -> bool:
        try:
            llm.generate([PROMPT], greedy(4), use_tqdm=False)
        except RepriseError as error:
            llm.shutdown()
            if leader is not None:
                leader.close()
                leader._finalizer()  # of a program that did not shut down
                leader._followers.close()
            return "forked" in str(error)
        return False

    with llm._lock:  # as if another thread had it
        forked(child)
    assert generate(llm, [PROMPT], greedy(4)) == before
    llm.shutdown()


def test_a_fork_of_a_process_that_computes_has_one_thread() -> None:
    """OpenMP would wait for ever for those of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        CpuPlatform().activate()

        def child() -> bool:
            CpuPlatform().activate()
            one = torch.get_num_threads() == 1
            CpuPlatform().share_host(1)
            return one and torch.get_num_threads() == 1

        forked(child)
        assert torch.get_num_threads() > 1 or len(os.sched_getaffinity(0)) == 1
    finally:
        torch.set_num_threads(threads)

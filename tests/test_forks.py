"""A process that is forked has its parent's engines, and must leave them alone."""

from __future__ import annotations

import os

import pytest
import torch
from forks import MARKS, is_true_in_a_fork
from helpers import TinyModels, generate, greedy, make_llm, need_devices, random_ids

from reprise.errors import RepriseError
from reprise.platforms.cpu import CpuPlatform

pytestmark = list(MARKS)
PROMPT = random_ids(0, 12)


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
        assert is_true_in_a_fork(child)
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

        assert is_true_in_a_fork(child)
        assert torch.get_num_threads() > 1 or len(os.sched_getaffinity(0)) == 1
    finally:
        torch.set_num_threads(threads)

"""An engine that a program drops without a word gives back what it has."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import threading
import time
import weakref
from typing import Any

import pytest
from helpers import TinyModels, greedy, need_devices

from reprise import LLM, AsyncLLM

PATIENCE_SECONDS = 60.0


def left() -> set[Any]:
    """Threads and children of this process."""
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True
    )
    children = {line for line in listed.stdout.splitlines() if "reprise" in line}
    threads = {each for each in threading.enumerate() if each.name.startswith("reprise")}
    return children | threads


async def use(llm: AsyncLLM) -> None:
    async for _ in llm.generate([1, 2], greedy(3)):
        pass


@pytest.mark.parametrize(
    ("kind", "ranks", "replicas"),
    [(LLM, 2, 1), (AsyncLLM, 1, 1), (AsyncLLM, 2, 1), (AsyncLLM, 1, 2)],
)
def test_what_nobody_has_is_freed(
    tiny: TinyModels, device: str, kind: type[LLM | AsyncLLM], ranks: int, replicas: int
) -> None:
    """An engine's threads, and the threads that watch its processes, know it and would keep it."""
    need_devices(device, ranks * replicas)
    before = left()
    llm: Any = kind(
        str(tiny("qwen3").path), device=device, dtype="float32", num_blocks=9, max_num_seqs=2,
        skip_tokenizer_init=True, graph_mode="none", tensor_parallel_size=ranks,
        data_parallel_size=replicas,
    )  # fmt: skip
    if kind is LLM:
        llm.generate([1, 2], greedy(3))
    else:
        asyncio.run(use(llm))
    frontend = weakref.ref(llm.frontend)
    assert len(left() - before) > 0
    del llm
    until = time.monotonic() + PATIENCE_SECONDS
    while (left() - before or frontend() is not None) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert not left() - before
    assert frontend() is None

"""The CPU: always there, and the platform that most tests run on."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from reprise.cpu_limits import usable_cpus
from reprise.openmp import waiting
from reprise.platforms import large_pages
from reprise.platforms.base import MemoryInfo, Platform
from reprise.platforms.device_graph import DeviceGraph
from reprise.platforms.host_queue import HostStream
from reprise.platforms.recorded_graph import RecordedGraph, recording
from reprise.platforms.recorded_pool import RecordedPool

GIB = 1 << 30

logger = logging.getLogger(__name__)


def _available_memory() -> int | None:
    """Bytes that programs can take without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


_computes = False
"""A CPU was activated in this process, or before it was forked."""
_forked = False
"""It is a fork of a process that computes."""


def _after_fork() -> None:
    global _forked
    _forked = _computes


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def settle_threads() -> None:
    """Have no more threads compute than CPUs are there for them, unless the user chose a number.

    torch counts the machine's CPUs. A container's share of their time is often less, and threads
    beyond it stand still, with all that wait for them, until the next period. In a fork of a
    process that has computed, OpenMP waits for ever for threads that only the parent has.
    """
    count = torch.get_num_threads()
    if _forked and count > 1:
        torch.set_num_threads(1)
        reason = "this process was forked by one that computes, whose other threads it has not"
    elif "OMP_NUM_THREADS" in os.environ:
        reason = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    else:
        cpus, reason = usable_cpus()
        if cpus < count:
            torch.set_num_threads(cpus)
    logger.info("CPU threads: %d (%s), %s", torch.get_num_threads(), reason, waiting)


def cpp_compiler_missing() -> str | None:
    """Why torch's compiler cannot write for the CPU here; None: it can."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if any(shutil.which(each) for each in compilers):
        return None
    return f"no C++ compiler ({compilers[0]}) on this machine"


class CpuPlatform(Platform):
    name = "cpu"
    device_type = "cpu"
    cluster_resource = "CPU"
    is_the_host = True
    priority = 0
    preferred: ClassVar = {"*": ("cpp", "onednn", "torch", "numpy", "reference", "invariant")}
    graph_memory_reason = "recorded graphs take host memory, which the KV cache does not claim"
    default_batched_tokens = 1024
    fp8_dtype = torch.float8_e4m3fn
    default_cache_bytes = 4 * GIB
    """The KV cache takes this much, or a quarter of the free memory if that is less."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._settled = False

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def device_name(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"

    @property
    def has_triton(self) -> bool:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return interpreted and importlib.util.find_spec("triton") is not None

    @property
    def default_dtype(self) -> torch.dtype:
        return torch.float32

    def prefers_dtype(self, dtype: torch.dtype) -> bool:
        return dtype is torch.float32

    def activate(self) -> None:
        """The CPU is always current. The first call settles how many threads compute."""
        global _computes
        if not self._settled:
            self._settled = _computes = True
            settle_threads()

    def device_of(self, rank: int, size: int) -> str:
        """All ranks compute on it."""
        return self.name

    def share_host(self, size: int) -> None:
        """Each rank gets its part of the threads, unless the user chose a number."""
        if "OMP_NUM_THREADS" not in os.environ and not _forked:
            torch.set_num_threads(max(1, usable_cpus()[0] // size))
            logger.info("CPU threads: %d, for each of %d ranks", torch.get_num_threads(), size)

    def synchronize(self) -> None:
        """Work on the CPU is finished when the call that started it returns."""

    def current_stream(self) -> Any:
        return HostStream()

    def use_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext(stream)

    @property
    def has_graphs(self) -> bool:
        return True

    def graph_pool(self) -> RecordedPool:
        return RecordedPool()

    def graph_pool_memory(self, pool: RecordedPool) -> list[torch.Tensor]:
        return pool.memory()

    def capture_stream(self) -> contextlib.AbstractContextManager[Any]:
        return recording()

    def compiler_missing(self) -> str | None:
        return cpp_compiler_missing()

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        return RecordedGraph(RecordedPool() if pool is None else pool)

    def memory_info(self) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        return MemoryInfo(free=_available_memory() or total // 2, total=total)

    def zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        # The system's zeros: pages that are not written take neither time nor memory. So it would
        # promise more than it has, too.
        size, free = count * dtype.itemsize, _available_memory()
        if free is not None and size > free:
            raise MemoryError(f"{free / GIB:.2f} GiB are free")
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype)

    def weights_memory(
        self, weights: Sequence[torch.Tensor]
    ) -> contextlib.AbstractContextManager[Any]:
        nbytes = sum(each.nbytes for each in weights)
        if nbytes < large_pages.LEAST or not large_pages.available():
            return contextlib.nullcontext()
        return large_pages.LargePages(nbytes, len(weights))

    def cache_budget(self, utilization: float, activation_bytes: int) -> int:
        free = self.memory_info().free - activation_bytes
        return min(self.default_cache_bytes, free // 4)

    def cache_reason(self, utilization: float) -> str:
        return "the platform's default"

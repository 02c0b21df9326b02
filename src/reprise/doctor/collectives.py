"""What sums over ranks take here, by size and implementation, and whether ranks agree.

``python -m reprise.doctor.collectives`` is one rank of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from reprise import ops, platforms
from reprise.distributed import Communicator, Group
from reprise.distributed.communicator import connect
from reprise.doctor.timing import once_ms
from reprise.errors import ConfigError, GraphError, RanksError
from reprise.ops import OpTable
from reprise.parallel.processes import rank_environment
from reprise.platforms import Platform

SIZES = tuple(1 << each for each in range(13, 26, 2))
"""Bytes of a sum: 8 KiB to 32 MiB."""
IN_A_ROW = 72
"""Sums that are timed together: those of a step of 36 layers."""
REPEATS = 20
ENOUGH_SECONDS = 1.0
"""A size that has been timed for so long is not repeated further."""
START_SECONDS = 60.0
"""Beside the measurement; a rank that hangs is ended behind it."""
REMEDY = (
    "devices that cannot reach each other hang so: try NCCL_P2P_DISABLE=1 and see NCCL_DEBUG=INFO; "
    "in a container give it shared memory (--shm-size=16g)"
)


def measure(device: str, size: int, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Start ``size`` ranks on this machine, measure, and end them.

    Args:
        device: Of rank 0; the others have the next ones.
        size: Ranks.
        sizes: Bytes of the sums.

    Raises:
        ConfigError: ``size`` is less than 2.
        PlatformError: There are not so many devices.
        RanksError: A rank fails or hangs; no process is left.
    """
    if size < 2:
        raise ConfigError(f"tensor_parallel_size={size}: collectives need at least 2 ranks")
    platform = platforms.resolve(device)
    names = [platform.device_of(rank, size) for rank in range(size)]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    limit = START_SECONDS + 4 * ENOUGH_SECONDS * len(sizes)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(size), str(store.port), name,
             json.dumps(list(sizes)), str(limit)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            env=rank_environment(size),
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    try:
        return _collect(ranks, time.monotonic() + limit)
    finally:
        for each in ranks:
            each.kill()
            each.wait()


def _collect(ranks: list[subprocess.Popen[str]], until: float) -> dict[str, Any]:
    """Rank 0's report, when all have ended; the first that fails is the reason."""
    while any(each.poll() is None for each in ranks):
        failed = [rank for rank, each in enumerate(ranks) if each.poll()]
        late = time.monotonic() > until
        if failed or late:
            rank = failed[0] if failed else [each.poll() for each in ranks].index(None)
            code = ranks[rank].poll()
            ranks[rank].kill()
            _, log = ranks[rank].communicate()
            lines = "".join(f"\n  {line}" for line in log.splitlines()[-8:])
            how = f"ended with code {code}" if failed else "does not answer"
            raise RanksError(f"rank {rank} {how}; {REMEDY}. The last lines of its log:{lines}")
        time.sleep(0.05)
    report: dict[str, Any] = json.loads(ranks[0].communicate()[0])
    return report


class _Measurement:
    """One rank's part."""

    def __init__(self, rank: int, size: int, port: int, device: str, timeout: float) -> None:
        self.platform: Platform = platforms.resolve(device)
        self.platform.activate()
        self.group = Group("doctor", rank, size)
        store = TCPStore("127.0.0.1", port, is_master=False)
        backend = self.platform.dist_backend
        self.communicator: Communicator = connect(
            self.group, backend, store, self.platform.device, timeout
        )
        self.in_graphs = self.platform.has_graphs and self.platform.asynchronous
        self.calls = IN_A_ROW if self.in_graphs else 8

    def report(self, sizes: Sequence[int]) -> dict[str, Any]:
        platform, communicator = self.platform, self.communicator
        return {
            "platform": platform.name,
            "device_name": platform.device_name,
            "ranks": self.group.size,
            "backend": platform.dist_backend,
            "in_graphs": self.in_graphs,
            "calls": self.calls,
            "reads_directly": communicator.symmetric is not None,
            "reaches": [
                platform.reaches(n) for n in range(0 if self.group.rank else self.group.size)
            ],
            "sums": [row for nbytes in sizes for row in self.rows(nbytes)],
        }

    def rows(self, nbytes: int) -> list[dict[str, Any]]:
        """A row for each implementation."""
        dtype = self.platform.default_dtype
        numbers = torch.Generator().manual_seed(self.group.rank)
        count = max(1, nbytes // dtype.itemsize)
        part = torch.randn(count, generator=numbers).to(dtype).to(self.platform.device)
        expected: Tensor | None = None
        found = []
        for name, implementation in ops.all_reduce.implementations.items():
            if implementation.unusable(self.platform) is not None:
                continue
            if implementation.refusal(x=part, group=self.group.name) is not None:
                continue
            table = OpTable(self.platform, {"all_reduce": name})
            with table.computing():
                x = part.clone()
                ops.all_reduce(x, self.group.name)
                expected = x if expected is None else expected
                ranks = self.communicator.all_gather(x.view(torch.uint8))
                us = self._microseconds(part)
            found.append(
                {
                    "bytes": nbytes,
                    "implementation": name,
                    "us": us,
                    "gb_per_s": nbytes / us / 1e3,
                    "bits_equal": bool((ranks == ranks[0]).all()),
                    "difference": float((x.float() - expected.float()).abs().max()),
                }
            )
        return found

    def _microseconds(self, part: Tensor) -> float:
        """Microseconds of one sum in a row of them; the slowest rank's median."""
        parts = [part.clone() for _ in range(min(self.calls, max(1, (256 << 20) // part.nbytes)))]

        def row() -> None:
            for number in range(self.calls):
                ops.all_reduce(parts[number % len(parts)], self.group.name)

        run: Callable[[], object] = row
        if self.in_graphs:
            with self.platform.capture_stream():
                ops.all_reduce(parts[0], self.group.name)
            self._together()
            graph = self.platform.new_graph()
            graph.capture(row)
            run = graph.replay
        times: list[float] = []
        while True:
            self._together()
            times.append(once_ms(self.platform, run))
            enough = len(times) >= REPEATS or sum(times) > 1e3 * ENOUGH_SECONDS
            if self._largest(float(enough)) > 0:  # of any rank: all stop at once
                break
        return self._largest(1e3 * statistics.median(times) / self.calls)

    def _together(self) -> None:
        self._largest(0.0)
        self.platform.synchronize()

    def _largest(self, value: float) -> float:
        """The largest value of all ranks."""
        own = torch.tensor([value], dtype=torch.float32, device=self.platform.device)
        return float(self.communicator.all_gather(own).max())


def _main() -> None:
    rank, size, port = map(int, sys.argv[1:4])
    device, sizes, timeout = sys.argv[4], json.loads(sys.argv[5]), float(sys.argv[6])
    try:
        report = _Measurement(rank, size, port, device, timeout).report(sizes)
    except GraphError as error:
        sys.exit(f"sums cannot be captured: {error}")
    if rank == 0:
        print(json.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # groups may wait for each other


if __name__ == "__main__":
    _main()

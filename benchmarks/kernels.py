"""Checks every Triton kernel against its reference on real shapes, and times it; so, too, other
implementations, by name.

    python benchmarks/kernels.py                     # all ops
    python benchmarks/kernels.py --only paged sample # those whose name contains one of these
    python benchmarks/kernels.py --only paged --implementations triton prompt

Shapes are those of Qwen3-0.6B and Qwen3-8B in bfloat16, and for attention those of other heads too:
the workloads in each op's ``cases.py``. Times are of replays of a device graph that holds many
calls, over several copies of the inputs where one would stay in the cache. The last column is the
share of what this device reached in the same run: bytes moved by a large copy, or operations of a
large matrix product.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise import platforms
from reprise.ops import Op, OpTable, all_ops
from reprise.ops.cases import Arguments, Maker, Workload
from reprise.platforms import Platform

DTYPE = torch.bfloat16
CACHE_BYTES = 256 << 20
"""Inputs of calls in a row are copies that together exceed a last-level cache."""


class DeviceMaker(Maker):
    """Makes large inputs where they are used."""

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if dtype.itemsize == 1:  # nothing draws numbers of eight bits
            return super().randn(*shape, dtype=dtype)
        return torch.randn(shape, device=self.device, dtype=dtype)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, device=self.device, dtype=dtype)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, device=self.device)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative; of what is masked, infinities are expected."""
    apart = torch.where(found == expected, 0.0, found - expected)
    return float(apart.norm() / expected.nan_to_num(0.0, 0.0, 0.0).norm())


class Bench:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.make = DeviceMaker(platform.device, DTYPE)

    # ---- timing --------------------------------------------------------------------------

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Median time of one of ``calls``, by replays of a graph that makes all of them."""

        def run() -> None:
            for call in calls:
                call()

        run()
        self.platform.synchronize()
        graph = self.platform.new_graph()
        graph.capture(run)
        times = []
        for _ in range(15):
            begin, end = (self.platform.event(timing=True) for _ in range(2))
            begin.record(self.platform.current_stream())
            graph.replay()
            end.record(self.platform.current_stream())
            self.platform.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times[3:])

    def copies(self, case: Workload) -> list[Arguments]:
        """Enough copies of a workload's inputs that their bytes exceed the cache; at most 64."""
        first = case.arguments()
        size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor) and x.dim() < 4)
        size = max(size, case.read_write, 1)
        count = min(64, math.ceil(CACHE_BYTES / size))
        return [first, *(case.arguments() for _ in range(count - 1))]

    def ceilings(self) -> tuple[float, float]:
        """Bytes per second of a copy, and operations per second of a matrix product."""
        source = self.make.randn(1 << 30)
        target = torch.empty_like(source)
        # By a kernel: inside a graph, copy_() would go to a slower copy engine.
        copy = self.seconds([lambda: torch.neg(source, out=target)] * 4)
        a, b = self.make.randn(8192, 8192), self.make.randn(8192, 8192)
        product = self.seconds([lambda: torch.mm(a, b, out=a.new_empty(8192, 8192))] * 4)
        return 2 * source.nbytes / copy, 2 * 8192**3 / product

    # ---- one line ------------------------------------------------------------------------

    def error(self, op: Op, name: str, case: Workload, arguments: Arguments) -> str:
        """Relative distance from the reference; or the share of draws that differ."""
        cloned = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        found = op.implementations[name].function(**arguments)
        expected = op.implementations["reference"].function(**cloned)
        pairs = [(each, cloned[name]) for name, each in op.written(arguments).items()]
        pairs += [(found, expected)] if expected is not None else []
        if case.exact:
            differing = sum(int((a != b).sum()) for a, b in pairs)
            return f"{differing} differ"
        distance = max(_distance(a.double(), b.double()) for a, b in pairs)
        return f"{distance:.1e}" + ("" if distance < 1e-2 else " WRONG")

    def line(self, op: Op, name: str, case: Workload, copy: float, product: float) -> str:
        """``name``: of the implementation."""
        function = op.implementations[name].function
        copies = self.copies(case)
        error = self.error(op, name, case, copies[0])
        calls = [lambda a=a: function(**a) for a in copies]
        seconds = self.seconds(calls * max(1, 16 // len(calls)))
        if case.operations:
            rate, unit, share = case.operations / seconds / 1e12, "TFLOP/s", product / 1e12
        else:
            rate, unit, share = case.read_write / seconds / 1e9, "GB/s", copy / 1e9
        other = "" if name == "triton" else name
        return (
            f"{op.name:19} {case.shape:36} {other:7}{seconds * 1e6:9.1f} us {rate:8.1f} {unit:8}"
            f"{rate / share:5.0%}  error {error}"
        )


def timed(op: Op, names: Sequence[str], platform: Platform) -> list[str]:
    """Those of the implementations ``names`` that the op has and that run here."""
    found = [(each, op.implementations.get(each)) for each in names]
    return [name for name, each in found if each is not None and each.unusable(platform) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of op names")
    parser.add_argument("--implementations", nargs="*", default=["triton"])
    options = parser.parse_args()
    platform = platforms.resolve(options.device)
    platform.activate()
    torch.manual_seed(0)
    bench = Bench(platform)
    copy, product = bench.ceilings()
    table = OpTable(platform)
    print(f"{platform.device_name}: copy {copy / 1e9:.0f} GB/s, bf16 8192^3 {product / 1e12:.0f} "
          f"TFLOP/s")  # fmt: skip
    with torch.inference_mode(), table.activate():
        for op in all_ops().values():
            names = timed(op, options.implementations, platform)
            if names and any(part in op.name for part in options.only):
                for case in op.cases.workloads(bench.make):
                    for name in names:
                        print(bench.line(op, name, case, copy, product), flush=True)
                        platform.empty_cache()


if __name__ == "__main__":
    main()

"""What the device can do at best, measured in the same run as the figures beside it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from reprise.layers import CausalLM, Linear, ScoredMLP, SparseMLP
from reprise.platforms import Platform

LEAST_COPY_BYTES, MOST_COPY_BYTES = 1 << 27, 1 << 32
LONG_COPY_SECONDS = 1.5e-3
TRIALS = 5
PATIENCE_SECONDS = 1.0
"""No further trial is begun after this time; a slow device gives fewer, longer ones."""
LARGEST_PRODUCT = 8192
READ_COLUMNS = 4096


@dataclass(frozen=True)
class Floor:
    """Ceilings of one device."""

    copy_bytes_per_second: float
    """Bytes read plus bytes written, of a copy from device memory to device memory."""
    read_bytes_per_second: float
    """Of as much memory as a decode step reads, by a sum or a matrix-vector product."""
    matmul_flops_per_second: float
    """Of a large square product in the compute dtype, on random data."""

    @property
    def bytes_per_second(self) -> float:
        """What bounds a step that reads weights. A processor reads faster than it copies, and what
        fits its cache faster still."""
        return max(self.copy_bytes_per_second, self.read_bytes_per_second)

    def as_dict(self) -> dict[str, Any]:
        return {
            "copy_tb_per_s": round(self.copy_bytes_per_second / 1e12, 4),
            "read_tb_per_s": round(self.read_bytes_per_second / 1e12, 4),
            "matmul_tflops_per_s": round(self.matmul_flops_per_second / 1e12, 3),
        }


def measure_floor(platform: Platform, dtype: torch.dtype, step_bytes: int) -> Floor:
    """Takes a second or two.

    Args:
        platform: What to measure.
        dtype: Compute dtype.
        step_bytes: What a decode step reads.
    """
    with torch.inference_mode():
        floor = Floor(
            _copy_rate(platform),
            _read_rate(platform, dtype, step_bytes),
            _matmul_rate(platform, dtype),
        )
    platform.empty_cache()
    return floor


def decode_bytes(model: CausalLM, experts_hit: float | None = None) -> int:
    """Bytes of weights that one decode step reads: all but an embedding table of its own, and of
    experts those that some row is sent to.

    Args:
        model: Any.
        experts_hit: So many of each layer, counted (:mod:`reprise.bench.experts`); None: as many as
            one row is sent to.
    """
    total = size(model.parameters())
    if not model.tied:
        total -= size(model.model.embed_tokens.parameters())
    for each in model.modules():
        if isinstance(each, SparseMLP | ScoredMLP):
            routing = each.routing
            hit = routing.top if experts_hit is None else experts_hit
            total -= round(size(each.experts.parameters()) * (1 - hit / routing.experts))
    return total


def weights_of_a_token(model: CausalLM) -> int:
    """Weights of the layers that a token is multiplied by, however many bits each has; of experts
    those of as many as compute a token."""
    total = 0
    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            total += module.in_features * module.out_features
        elif isinstance(module, SparseMLP | ScoredMLP):
            stacks = module.experts.gate_up_proj, module.experts.down_proj
            total += module.routing.top * sum(s.in_features * s.out_features for s in stacks)
    return total


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(each.numel() * each.element_size() for each in tensors)


def _copy_rate(platform: Platform) -> float:
    """Bytes a second of a copy that is so large that neither its start nor a cache matters."""
    room = platform.memory_info().free // 4
    count, rate = LEAST_COPY_BYTES, 0.0
    while not rate or (count <= MOST_COPY_BYTES and 2 * count <= room):
        source = torch.ones(count, dtype=torch.uint8, device=platform.device)
        target = torch.empty_like(source)
        seconds = _seconds(platform, functools.partial(target.copy_, source))
        rate = max(rate, 2 * count / seconds)
        if seconds > LONG_COPY_SECONDS:
            break
        count *= 2
    return rate


def _read_rate(platform: Platform, dtype: torch.dtype, step_bytes: int) -> float:
    """Of ``step_bytes``, or of as much as there is room for: then no cache holds it either."""
    nbytes = min(step_bytes, platform.memory_info().free // 4)
    columns = max(1, min(READ_COLUMNS, nbytes // dtype.itemsize))
    rows = max(1, nbytes // (columns * dtype.itemsize))
    matrix = torch.ones(rows, columns, dtype=dtype, device=platform.device)
    vector, out = matrix[0].clone(), matrix.new_empty(rows)
    works = (matrix.sum, functools.partial(torch.mv, matrix, vector, out=out))
    return size([matrix]) / min(_seconds(platform, work) for work in works)


def _matmul_rate(platform: Platform, dtype: torch.dtype) -> float:
    rows, rate = 512, 0.0
    while rows <= LARGEST_PRODUCT:
        a, b = (torch.randn(2, rows, rows, device=platform.device) * 0.1).to(dtype)
        out = torch.empty_like(a)
        seconds = _seconds(platform, functools.partial(torch.mm, a, b, out=out))
        rate = max(rate, 2 * rows**3 / seconds)
        if seconds > 0.02:  # larger products would say the same and take long
            break
        rows *= 2
    return rate


def _seconds(platform: Platform, work: Callable[[], Any], calls: int = 4) -> float:
    """Shortest time of one call, by the device's clock; the first call is not counted."""
    work()
    found: list[float] = []
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while len(found) < TRIALS and (not found or time.perf_counter() < deadline):
        begin, end = platform.event(timing=True), platform.event(timing=True)
        begin.record(platform.current_stream())
        for _ in range(calls):
            work()
        end.record(platform.current_stream())
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / calls)
    return min(found)

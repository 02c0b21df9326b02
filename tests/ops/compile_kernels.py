"""Compiles every Triton kernel for a device that is not there, and prints what it would need.

    python compile_kernels.py cuda 90 232448
    python compile_kernels.py hip gfx942 65536

Arguments: Triton's backend, its architecture, and the bytes of shared memory that a program can
have there. Prints one JSON object a kernel, its name and bytes of shared memory; where an op
fails, its name and the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from reprise import ops
from reprise.ops import triton_util

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INNER, VOCAB = 1024, 16, 8, 128, 3072, 151936


def main(backend: str, architecture: str, shared_memory: int) -> None:
    target = GPUTarget(
        backend,
        int(architecture) if backend == "cuda" else architecture,
        64 if architecture.startswith("gfx9") else 32,
    )
    pretend_device(target, shared_memory)
    for name, compiled in kernels():
        print(json.dumps({"kernel": name, **compiled}), flush=True)


def pretend_device(target: GPUTarget, shared_memory: int) -> None:
    """Let Triton compile for ``target``, and launch nothing."""
    properties = {"multiprocessor_count": 132, "max_shared_mem": shared_memory}
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    triton.runtime.driver.set_active(driver)
    CompiledKernel._init_handles = lambda self: None
    # Where early launch exists, it is compiled too.
    early = SimpleNamespace(supports_pdl=target.backend == "cuda" and target.arch >= 90)
    triton_util.active_platform = lambda: early


def kernels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kernel that the ops' Triton implementations launch, compiled."""
    found: list[tuple[str, dict[str, Any]]] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = original(self, *args, warmup=True, **kwargs)
        found.append((self.__name__, {"shared_memory": compiled.metadata.shared}))
        return compiled

    JITFunction.run = run
    for name, call in calls():
        implementation = getattr(ops, name).implementations["triton"].function
        try:
            call(implementation)
        except Exception as error:
            found.append((name, {"error": f"{type(error).__name__}: {error}"[:2000]}))
        yield from found
        found.clear()


def calls() -> Iterator[tuple[str, Callable[[Callable[..., Any]], Any]]]:
    """Calls of every op with a Triton implementation that between them need all kernels."""
    for rows in (1, 64):
        x, gain = empty(rows, HIDDEN), empty(HIDDEN)
        yield "rms_norm", lambda f, x=x, gain=gain: f(x, gain, 1e-6)
        yield "silu_and_mul", lambda f, x=x: f(x)
        yield "linear", lambda f, x=x: f(x, empty(VOCAB // 128, HIDDEN), None)
        yield "norm_linear", lambda f, x=x, g=gain: f(x, g, 1e-6, empty(4096, HIDDEN), empty(4096))
        yield (
            "norm_gated_linear",
            lambda f, x=x, gain=gain: f(x, gain, 1e-6, empty(2 * INNER, HIDDEN), None),
        )
        wide, out = empty(rows, INNER), empty(rows, HIDDEN)
        yield "linear_add", lambda f, x=wide, out=out: f(x, empty(HIDDEN, INNER), None, out)
        yield "rotary_cache", lambda f, rows=rows: rotary_cache(f, rows, HEAD_SIZE)
        yield "rotary_cache", lambda f, rows=rows: rotary_cache(f, rows, 2)  # without positions
        yield "argmax", lambda f, rows=rows: f(empty(rows, VOCAB))
    yield "sample", sample
    yield "apply_penalties", penalties
    for units in (None, torch.zeros(20, dtype=torch.int64)):
        words = torch.empty(2, 40, 8192, dtype=torch.int32)
        yield "checksum", lambda f, words=words, units=units: f(words, units)
    yield "checksum", lambda f: f(torch.empty(1, 1, 1 << 20, dtype=torch.int32), None)
    for head_size in (128, 256):
        for requests, heads, new in ((4, HEADS, 1), (64, HEADS, 1), (4, 64, 2)):
            yield (
                "paged_attention",
                lambda f, shape=(requests, heads, head_size, new): attention(f, *shape, True),
            )
        yield (
            "paged_attention",
            lambda f, size=head_size: attention(f, 2, HEADS, size, 100, False),
        )


def rotary_cache(function: Callable[..., Any], rows: int, rotated: int) -> None:
    cache = empty(2, 4, 16, KV_HEADS, HEAD_SIZE)
    numbers = torch.zeros(rows, dtype=torch.int64)
    function(
        empty(rows, (HEADS + 2 * KV_HEADS) * HEAD_SIZE), numbers,
        torch.empty(4096, rotated), numbers, cache[0], cache[1], empty(HEAD_SIZE),
        empty(HEAD_SIZE), 1e-6,
    )  # fmt: skip


def attention(
    function: Callable[..., Any], requests: int, heads: int, head_size: int, new: int, equal: bool
) -> None:
    cache = empty(2, 4, 16, KV_HEADS, head_size)
    query = empty(requests * new, heads, head_size)
    function(
        query, cache[0], cache[1], torch.zeros(requests, 8, dtype=torch.int32),
        torch.zeros(requests, dtype=torch.int32), torch.zeros(requests + 1, dtype=torch.int32),
        torch.empty_like(query), 1.0, 0, 0.0, new if equal else 0,
    )  # fmt: skip


def sample(function: Callable[..., Any]) -> None:
    number, seed = torch.ones(1), torch.ones(1, dtype=torch.int64)
    function(torch.empty(1, VOCAB), number, number.int(), number, number, seed, seed)


def penalties(function: Callable[..., Any]) -> None:
    row, number = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    seen = torch.zeros(1, VOCAB, dtype=torch.int32)
    function(torch.empty(1, VOCAB), row, seen, row, number, number, number)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.causal_conv.cases import DRAFTS, NO_DRAFTS, STEPS, VERIFYING, batch, drafts


def arguments(
    make: Maker,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    begins: Sequence[int],
    new: Sequence[int],
    fresh: Sequence[bool],
    query_len: int,
    padding: int = 0,
) -> Arguments:
    """``heads``: HK, HV; ``sizes``: K, V; the others as in :data:`STEPS`."""
    (key_heads, value_heads), (key_size, value_size) = heads, sizes
    tokens = sum(new) + padding
    # Both gates are parts of one wider product.
    gates = make.randn(tokens, 2 * value_heads + 8)
    return {
        "qkv": make.randn(tokens, 2 * key_heads * key_size + value_heads * value_size),
        "a": gates[:, value_heads : 2 * value_heads],
        "b": gates[:, :value_heads],
        "a_log": make.randn(value_heads, dtype=torch.float32),
        "dt_bias": make.randn(value_heads, dtype=torch.float32),
        "state": make.randn(
            len(new) + 1, value_heads, value_size, key_size, dtype=torch.float32
        ),
        **batch(make, begins, new, fresh),
        "out": make.randn(tokens, value_heads, value_size),
        "query_len": query_len,
        "recent": None,
        "gates": None,
        **NO_DRAFTS,
    }  # fmt: skip


def _small(make: Maker) -> list[Arguments]:
    shapes = (((2, 4), (16, 8)), ((1, 3), (24, 32)))
    found = [arguments(make, heads, sizes, *step) for (heads, sizes) in shapes for step in STEPS]
    heads, sizes = shapes[0]
    for begins, new, fresh, query_len, padding, *told in VERIFYING:
        call = arguments(make, heads, sizes, begins, new, fresh, query_len, padding)
        found.append(call | _drafted(make, heads, sizes, new, padding, *told))
    return found


def _drafted(
    make: Maker,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    new: Sequence[int],
    padding: int,
    *told: Sequence[int],
) -> Arguments:
    """What is kept of drafts, and what ops are told of them; see :data:`VERIFYING`."""
    rows = len(new) + 1, 1 + DRAFTS
    gates = make.randn(*rows, 2, heads[1], dtype=torch.float32)
    gates[:, :, 0] = -gates[:, :, 0].abs()
    kept = heads[0] * sizes[0] + heads[1] * sizes[1]
    recent = make.randn(*rows, kept)
    return {"recent": recent, "gates": gates, **drafts(make, new, padding, *told)}


def _workload(
    make: Maker, heads: tuple[int, int], requests: int, new: int, *, compiled: bool = False
) -> Workload:
    verify = new == 1 + DRAFTS
    decode = new == 1 or verify
    sizes = 128, 128

    def called() -> Arguments:
        step = [decode] * requests, [new] * requests, [not decode] * requests
        call = arguments(make, heads, sizes, *step, new if decode else 0)
        if verify:
            nothing = [0] * requests
            call |= _drafted(make, heads, sizes, step[1], 0, [2] * requests, nothing, nothing)
        return call

    channels = (2 * heads[0] + 2 * heads[1]) * 128
    # What is kept of tokens is read and written.
    channels += verify * 2 * (heads[0] + heads[1]) * 128
    states = 4 * requests * heads[1] * 128 * 128 * (1 + decode)
    return Workload(
        f"{heads[0]} and {heads[1]} heads, {requests} x {new}" + ", drafts" * verify,
        called,
        read_write=2 * requests * new * channels + states,
        compiled=compiled,
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for requests in (1, 32, 128, 512):
        yield _workload(make, (2, 8), requests, 1, compiled=requests == 32)
    yield _workload(make, (16, 32), 32, 1)
    yield _workload(make, (16, 32), 32, 1 + DRAFTS, compiled=True)
    yield _workload(make, (2, 8), 1, 8192, compiled=True)
    yield _workload(make, (16, 32), 1, 8192)
    yield _workload(make, (16, 32), 16, 100)


cases = Cases(_small, _workloads)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from reprise.ops.cases import (
    BLOCK_SIZE,
    LARGE,
    SMALL,
    Arguments,
    Cases,
    Dimensions,
    Maker,
    Workload,
)
from reprise.ops.fp8_rows import quantise

_MAX_LEN = 40960
_NARROW = Dimensions("heads of 64", 2048, 32, 8, 64, 8192, 128256)
"""Llama 3.2 1B's."""
_WIDE = Dimensions("heads of 256", 2048, 16, 8, 256, 6144)
_MANY = Dimensions("64 heads", 8192, 64, 8, 128, 28672)
"""Llama 3.3 70B's."""
_WIDE_AND_MANY = Dimensions("64 heads of 256", 8192, 64, 8, 256, 28672)


def as_codes(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same call with a cache of eight bits."""
    found = dict(arguments)
    for name in ("key", "value"):
        found[f"{name}_cache"], scales = quantise(arguments[f"{name}_cache"], dtype)
        found[f"{name}_scales"] = scales.transpose(1, 2).contiguous()
    return found


def _small(make: Maker) -> list[Arguments]:
    plain = _small_of_numbers(make)
    return plain if make.fp8 is None else [*plain, *(as_codes(each, make.fp8) for each in plain)]


def _small_of_numbers(make: Maker) -> list[Arguments]:
    batches = (
        # Lengths, new tokens of each, query_len, window, tokens of padding behind the requests.
        ([1, 37, 64, 0], [1, 1, 1, 1], 1, 0, 0),
        ([5, 40, 20, 0], [5, 3, 1, 0], 0, 20, 3),
    )
    return [
        {
            "query": make.randn(sum(new) + padding, 4, 32),
            "key_cache": make.randn(12, BLOCK_SIZE, 2, 32),
            "value_cache": make.randn(12, BLOCK_SIZE, 2, 32),
            "block_tables": make.ints(
                [1, 0, 0, 0, 7, 3, 5, 0, 11, 2, 8, 6, 0, 0, 0, 0], torch.int32
            ).view(4, 4),
            "seq_lens": make.ints(lengths, torch.int32),
            "query_start_loc": torch.cat(
                (make.ints([0]), make.ints(new).cumsum(0))
            ).to(torch.int32),
            "out": make.randn(sum(new) + padding, 4, 32),
            "scale": 32**-0.5,
            "sliding_window": window,
            "soft_cap": 0.0,
            "query_len": query_len,
            "key_scales": None,
            "value_scales": None,
            "prompt": 0,
        }
        for lengths, new, query_len, window, padding in batches
    ]  # fmt: skip


def _workload(
    make: Maker,
    model: Dimensions,
    lengths: Sequence[int],
    new: int,
    shape: str,
    *,
    query_len: int | None = None,
    compiled: bool = False,
    codes: bool = False,
) -> Workload:
    """``new`` new tokens of each request, blocks scattered over the cache; ``codes``: of eight
    bits."""
    counts = [math.ceil(length / BLOCK_SIZE) for length in lengths]
    requests, tokens = len(lengths), new * len(lengths)

    def arguments() -> Arguments:
        order = make.permutation(sum(counts)) + 1
        tables = torch.zeros(
            requests, max(*counts, _MAX_LEN // BLOCK_SIZE), device=make.device, dtype=torch.int32
        )
        for row, blocks in enumerate(order.split(counts)):
            tables[row, : len(blocks)] = blocks
        cache = (sum(counts) + 1, BLOCK_SIZE, model.kv_heads, model.head_size)
        query = make.randn(tokens, model.heads, model.head_size)
        found = {
            "query": query,
            "key_cache": make.randn(*cache),
            "value_cache": make.randn(*cache),
            "block_tables": tables,
            "seq_lens": make.ints(lengths, torch.int32),
            "query_start_loc": make.ints(range(0, tokens + 1, new), torch.int32),
            "out": torch.full_like(query, torch.nan),
            "scale": model.head_size**-0.5,
            "sliding_window": 0,
            "soft_cap": 0.0,
            "query_len": new if query_len is None else query_len,
            "key_scales": None,
            "value_scales": None,
            "prompt": new if list(lengths) == [new] else 0,
        }
        return as_codes(found, make.fp8) if codes and make.fp8 is not None else found

    head_bytes = model.head_size + 4 if codes else 2 * model.head_size
    kv_bytes = 2 * sum(lengths) * model.kv_heads * head_bytes
    pairs = sum(new * (length - new) + new * (new + 1) // 2 for length in lengths)
    computes = new > 64
    return Workload(
        f"{model.name}, {shape}" + (", fp8" if codes else ""),
        arguments,
        read_write=0 if computes else kv_bytes,
        operations=4 * pairs * model.heads * model.head_size if computes else 0,
        compiled=compiled,
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for model, length, requests in [
        (LARGE, 32768, 1), (LARGE, 16384, 8), (LARGE, 1024, 64), (LARGE, 2000, 128),
        (LARGE, 512, 1), (SMALL, 4096, 16), (LARGE, 272, 64), (SMALL, 800, 128),
    ]:  # fmt: skip
        yield _workload(make, model, [length] * requests, 1, f"decode {requests} x {length}")
    ragged = [100_000, *[1000] * 31]
    yield _workload(make, LARGE, ragged, 1, "decode 1 x 100000 + 31 x 1000")
    yield _workload(make, LARGE, [16384], 4, "verify 1 x 16384, 4 tokens each")
    yield _workload(make, LARGE, [8192], 8192, "prefill 8192")
    yield _workload(make, SMALL, [8192], 8192, "prefill 8192")
    yield _workload(make, LARGE, [2048] * 4, 2048, "prefill 4 x 2048")
    yield _workload(make, LARGE, [32768], 2048, "chunk of 2048 at 32768")
    yield _workload(make, _NARROW, [8192], 8192, "prefill 8192")
    yield _workload(make, _NARROW, [2048] * 4, 2048, "prefill 4 x 2048")
    for model in (SMALL, _WIDE):
        for requests in (4, 64):
            shape = f"decode {requests} x 48"
            yield _workload(make, model, [48] * requests, 1, shape, compiled=True)
            if make.fp8 is not None:
                yield _workload(make, model, [48] * requests, 1, shape, compiled=True, codes=True)
        shape = "a mixed step, 2 x 100"
        yield _workload(make, model, [100] * 2, 100, shape, query_len=0, compiled=True)
        if make.fp8 is not None:
            yield _workload(make, model, [100] * 2, 100, shape, query_len=0, compiled=True,
                            codes=True)  # fmt: skip
    if make.fp8 is not None:
        for length, requests in [(32768, 1), (16384, 8), (8192, 32), (1024, 64)]:
            shape = f"decode {requests} x {length}"
            yield _workload(make, LARGE, [length] * requests, 1, shape, codes=True)
        yield _workload(make, LARGE, [16384], 4, "verify 1 x 16384, 4 tokens each", codes=True)
        yield _workload(make, LARGE, [8192], 8192, "prefill 8192", codes=True)
        yield _workload(make, LARGE, [32768], 2048, "chunk of 2048 at 32768", codes=True)
    for model in (_MANY, _WIDE_AND_MANY):
        yield _workload(make, model, [48] * 4, 2, "verify 4 x 48, 2 tokens each", compiled=True)


cases = Cases(_small, _workloads)

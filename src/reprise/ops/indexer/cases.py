from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from reprise.ops.cases import Arguments, Cases, Maker, Workload
from reprise.ops.compressor.cases import paged, step
from reprise.ops.latent_rows import as_codes


def arguments(
    make: Maker, lengths: Sequence[int], new: Sequence[int], top: int, heads: int, size: int,
    query_len: int, padding: int = 0, every: int = 4, block: int = 16,
) -> Arguments:  # fmt: skip
    """``block``: tokens."""
    tables, _, count = paged(make, lengths, new, block, padding)
    tokens = sum(new) + padding
    where = step(make, lengths, new, padding)
    return {
        "query": make.randn(tokens, heads, size),
        "weights": make.randn(tokens, heads + 3, dtype=torch.float32)[:, :heads],
        "keys": make.randn(count, block // every, size),
        "block_tables": tables,
        "seq_lens": where["seq_lens"],
        "query_start_loc": where["query_start_loc"],
        "out": make.randint(9, tokens, top, dtype=torch.int32),
        "every": every,
        "scale": size**-0.5,
        "query_len": query_len,
        "scales": None,
    }


def _small(make: Maker) -> list[Arguments]:
    coded = []
    if make.fp8 is not None:
        found = arguments(make, [37, 9], [3, 1], 4, 32, 16, 0)
        found["keys"], _, found["scales"] = as_codes(found["keys"], 0, make.fp8)
        coded.append(found)
    return [
        arguments(make, [3, 37, 64, 0], [1, 1, 1, 0], 4, 32, 16, 1, padding=1),
        arguments(make, [21, 90, 5, 0], [21, 13, 3, 0], 6, 32, 16, 0, padding=2),
        arguments(make, [40, 18], [4, 4], 512, 32, 32, 4),
        *coded,
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    # Chunks of the second length leave fewer rows than one of them has.
    for requests, length in ((1, 4096), (1, 65536), (64, 4096), (1, 131072), (64, 131072)):
        yield Workload(
            f"Flash, {requests} x {length}",
            functools.partial(
                arguments, make, [length] * requests, [1] * requests, 512, 64, 128, 1, block=128
            ),
            read_write=requests * length // 4 * 128 * 2,
            compiled=requests == 1,
        )
    if make.fp8 is not None:
        yield Workload(
            "Flash, 1 x 4096, codes", functools.partial(_codes_of_flash, make), compiled=True
        )


def _codes_of_flash(make: Maker) -> Arguments:
    assert make.fp8 is not None
    found = arguments(make, [4096], [1], 512, 64, 128, 1, block=128)
    found["keys"], _, found["scales"] = as_codes(found["keys"], 0, make.fp8)
    return found


cases = Cases(_small, _workloads)

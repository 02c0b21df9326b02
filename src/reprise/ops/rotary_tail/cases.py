from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from reprise.ops.cases import EPS, Arguments, Cases, Maker, Workload

HEAD, ROTATED = 512, 64
"""Of DeepSeek-V4."""


def table(make: Maker, positions: int, rotated: int) -> Tensor:
    """[positions, rotated] float32: cosines, then sines."""
    exponents = torch.arange(0, rotated, 2) / rotated
    angles = torch.arange(float(positions)).unsqueeze(1) * 10000.0**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(make.device)


def _arguments(
    make: Maker, tokens: int, heads: int, size: int, rotated: int, norm_eps: float, inverse: bool
) -> Arguments:
    return {
        # Behind them in a row lies what another product gave.
        "x": make.randn(tokens, heads * size + 64)[:, : heads * size].unflatten(1, (heads, size)),
        "positions": make.ints((7 * each) % 40 for each in range(tokens)),
        "cos_sin": table(make, 40, rotated),
        "norm_eps": norm_eps,
        "inverse": inverse,
    }


def _small(make: Maker) -> list[Arguments]:
    return [
        _arguments(make, 1, 4, 32, 8, EPS, False),
        _arguments(make, 7, 2, 64, 64, 0.0, False),
        _arguments(make, 5, 4, 32, 8, 0.0, True),
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    for tokens, norm_eps, inverse in ((1, EPS, False), (64, EPS, False), (64, 0.0, True),
                                      (8192, 0.0, True)):  # fmt: skip
        yield Workload(
            f"Flash, T={tokens}" + (", back" if inverse else ""),
            functools.partial(_arguments, make, tokens, 64, HEAD, ROTATED, norm_eps, inverse),
            read_write=2 * 2 * tokens * 64 * HEAD,
            compiled=tokens <= 64,
        )


cases = Cases(_small, _workloads)

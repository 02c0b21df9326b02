from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reprise.ops.cases import (
    BLOCK_SIZE,
    EPS,
    SMALL,
    Arguments,
    Cases,
    Dimensions,
    Maker,
    Workload,
)


def _table(make: Maker, positions: int, rotated: int) -> Tensor:
    """[positions, rotated] float32: cosines, then sines."""
    exponents = torch.arange(0, rotated, 2) / rotated
    angles = torch.arange(float(positions)).unsqueeze(1) * 10000.0**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(make.device)


def _as_codes(arguments: Arguments, dtype: torch.dtype, *fixed: float) -> Arguments:
    """The same call with a cache of eight bits."""
    found = dict(arguments)
    for name in ("key", "value"):
        cache = arguments[f"{name}_cache"]
        blocks, size, heads, _ = cache.shape
        found[f"{name}_cache"] = cache.to(dtype)
        found[f"{name}_scales"] = torch.zeros(blocks, heads, size, device=cache.device)
    found["fixed_scales"] = torch.tensor(fixed, device=cache.device) if fixed else None
    return found


def _small(make: Maker) -> list[Arguments]:
    plain = _small_of_numbers(make)
    if make.fp8 is None:
        return plain
    return [*plain, _as_codes(plain[1], make.fp8), _as_codes(plain[2], make.fp8, 0.01, 0.0)]


def _small_of_numbers(make: Maker) -> list[Arguments]:
    wide = (make.randn(32, dtype=torch.float32), make.randn(32, dtype=torch.float32))
    variants = (
        # Norms, channels that are rotated, channels behind those of the heads.
        ((None, None), 32, 0),
        ((make.randn(32), make.randn(32)), 32, 0),
        (wide, 8, 64),
    )
    return [
        {
            "qkv": make.randn(5, (4 + 2 + 2) * 32 + more)[:, : (4 + 2 + 2) * 32],
            "positions": make.ints([0, 3, 17, 31, 0]),
            "cos_sin": _table(make, 32, rotated),
            "slot_mapping": make.ints([17, 40, 23, 63, 0]),
            "key_cache": make.randn(4, BLOCK_SIZE, 2, 32),
            "value_cache": make.randn(4, BLOCK_SIZE, 2, 32),
            "query_norm": query_norm,
            "key_norm": key_norm,
            "eps": EPS,
            "key_scales": None,
            "value_scales": None,
            "fixed_scales": None,
        }
        for (query_norm, key_norm), rotated, more in variants
    ]


def _workload(
    make: Maker, model: Dimensions, tokens: int, rotated: int, *, codes: bool = False
) -> Workload:
    size = model.head_size

    def arguments() -> Arguments:
        blocks = tokens // BLOCK_SIZE + 2
        cache = (blocks, BLOCK_SIZE, model.kv_heads, size)
        found = {
            "qkv": make.randn(tokens, model.projected),
            "positions": make.ints(range(tokens)),
            "cos_sin": _table(make, max(tokens, 4096), rotated),
            "slot_mapping": make.permutation((blocks - 1) * BLOCK_SIZE)[:tokens] + BLOCK_SIZE,
            "key_cache": torch.zeros(cache, device=make.device, dtype=make.dtype),
            "value_cache": torch.zeros(cache, device=make.device, dtype=make.dtype),
            "query_norm": make.randn(size),
            "key_norm": make.randn(size),
            "eps": EPS,
            "key_scales": None,
            "value_scales": None,
            "fixed_scales": None,
        }
        return _as_codes(found, make.fp8, 0.0, 0.0) if codes and make.fp8 is not None else found

    few = f", {rotated} rotated" if rotated < size else ""
    return Workload(
        f"{model.name}, T={tokens}{few}" + (", fp8" if codes else ""),
        arguments,
        read_write=2 * 2 * tokens * model.projected,
        compiled=model is SMALL and tokens <= 64,
    )


def _workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in (1, 64, 8192):
            yield _workload(make, model, tokens, model.head_size)
    for tokens in (1, 64):
        yield _workload(make, SMALL, tokens, 2)
    if make.fp8 is not None:
        for tokens in (1, 64, 8192):
            yield _workload(make, SMALL, tokens, SMALL.head_size, codes=True)


cases = Cases(_small, _workloads)

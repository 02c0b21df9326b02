"""Small inputs for every op, for the comparison with its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reprise.ops.apply_penalties import IN_PROMPT
from reprise.platforms import Platform

Arguments = dict[str, Any]
EPS = 1e-6


class Maker:
    """Random tensors, the same on every device."""

    def __init__(self, platform: Platform, dtype: torch.dtype) -> None:
        self.device, self.dtype = platform.device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator)
        return values.to(self.device, self.dtype)

    def ints(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def floats(self, *values: float) -> torch.Tensor:
        """float32, whatever ``dtype`` is."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def _linear(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(rows, 64), "weight": make.randn(96, 64) / 8, "bias": bias}
        for rows, bias in ((1, None), (5, make.randn(96)))
    ]


def _argmax(make: Maker) -> list[Arguments]:
    return [{"logits": make.randn(rows, 5000)} for rows in (1, 9)]


def _norm_linear(make: Maker) -> list[Arguments]:
    return [
        {
            "x": make.randn(rows, 64),
            "norm_weight": make.randn(64),
            "eps": EPS,
            "weight": make.randn(96, 64) / 8,
            "bias": bias,
        }
        for rows, bias in ((1, None), (1, make.randn(96)), (5, None))
    ]


def _linear_add(make: Maker) -> list[Arguments]:
    return [{**each, "residual": make.randn(len(each["x"]), 96)} for each in _linear(make)]


def _linear_into(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(rows, 64), "weight": make.randn(96, 64) / 8, "out": make.randn(rows, 96)}
        for rows in (1, 5)
    ]


def _rms_norm(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(*shape), "weight": make.randn(shape[-1]), "eps": EPS}
        for shape in ((1, 64), (7, 3, 64))
    ]


def _silu_and_mul(make: Maker) -> list[Arguments]:
    return [{"x": make.randn(rows, 192)} for rows in (1, 9)]


def _rotary_cache(make: Maker) -> list[Arguments]:
    angle = torch.arange(32.0).unsqueeze(1) * 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).to(make.device)
    norms = ((None, None), (make.randn(32), make.randn(32)))
    return [
        {
            "qkv": make.randn(5, (4 + 2 + 2) * 32),
            "positions": make.ints([0, 3, 17, 31, 0]),
            "cos_sin": cos_sin,
            "slot_mapping": make.ints([17, 40, 23, 63, 0]),
            "key_cache": make.randn(4, 16, 2, 32),
            "value_cache": make.randn(4, 16, 2, 32),
            "query_norm": query_norm,
            "key_norm": key_norm,
            "eps": EPS,
        }
        for query_norm, key_norm in norms
    ]


def _paged_attention(make: Maker) -> list[Arguments]:
    cases = (
        # Lengths, new tokens of each, query_len, window.
        ([1, 37, 64, 0], [1, 1, 1, 1], 1, 0),
        ([5, 40, 20, 0], [5, 3, 1, 0], 0, 20),
    )
    return [
        {
            "query": make.randn(sum(new), 4, 32),
            "key_cache": make.randn(12, 16, 2, 32),
            "value_cache": make.randn(12, 16, 2, 32),
            "block_tables": make.ints(
                [1, 0, 0, 0, 7, 3, 5, 0, 11, 2, 8, 6, 0, 0, 0, 0], torch.int32
            ).view(4, 4),
            "seq_lens": make.ints(lengths, torch.int32),
            "query_start_loc": torch.cat(
                (make.ints([0]), make.ints(new).cumsum(0))
            ).to(torch.int32),
            "out": make.randn(sum(new), 4, 32),
            "scale": 32**-0.5,
            "sliding_window": window,
            "soft_cap": 0.0,
            "query_len": query_len,
        }
        for lengths, new, query_len, window in cases
    ]  # fmt: skip


def _sample(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # logits are float32, whatever the model computes in

    return [
        {
            "logits": make.randn(4, 500).float() * 3,
            "temperature": make.floats(0.0, 0.7, 1.0, 1.3),
            "top_k": make.ints([0, 20, 0, 5], torch.int32),
            "top_p": make.floats(1.0, 0.9, 0.8, 1.0),
            "min_p": make.floats(0.0, 0.0, 0.05, 0.0),
            "seeds": make.ints([1, 2, 3, 4]),
            "positions": make.ints([0, 1, 2, 3]),
        }
    ]


def _apply_penalties(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # as above

    seen = make.ints([0, 1, 3, IN_PROMPT, IN_PROMPT + 2], torch.int32).repeat(3, 100)
    return [
        {
            "logits": make.randn(4, 500).float() * 3,
            "rows": make.ints([3, 0]),
            "seen": seen,
            "slots": make.ints([1, 2]),
            "repetition": make.floats(1.3, 1.0),
            "presence": make.floats(0.0, 0.5),
            "frequency": make.floats(0.2, 0.7),
        }
    ]


def _checksum(make: Maker) -> list[Arguments]:
    if make.dtype is not torch.float32:
        return []  # words are words
    words = make.randn(2, 9, 200).view(torch.int32)
    return [
        {"words": words, "units": None},
        {"words": words, "units": make.ints([8, 0, 3])},
        {"words": make.randn(1, 1, 70_000).view(torch.int32), "units": None},
    ]


CASES: dict[str, Callable[[Maker], list[Arguments]]] = {
    "apply_penalties": _apply_penalties,
    "argmax": _argmax,
    "checksum": _checksum,
    "linear": _linear,
    "norm_linear": _norm_linear,
    "norm_gated_linear": _norm_linear,
    "linear_add": _linear_add,
    "linear_into": _linear_into,
    "rms_norm": _rms_norm,
    "silu_and_mul": _silu_and_mul,
    "rotary_cache": _rotary_cache,
    "paged_attention": _paged_attention,
    "sample": _sample,
}
"""By op; a plug-in adds the cases of its own ops."""

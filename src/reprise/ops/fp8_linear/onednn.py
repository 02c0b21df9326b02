"""Products of eight bits on a CPU: weights are widened piece by piece, within the processor's
cache, and multiplied through oneDNN.

torch widens float8 one number at a time. The seven bits behind the sign are those of a float16 of a
256th, so that a few operations on whole vectors do the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reprise.ops.fp8_linear.reference import quantise
from reprise.ops.linear.onednn import linear

PIECE = 1 << 18
"""Weights that are widened at once."""


def accepts(x: Tensor, block_k: int, **_: Any) -> str | None:
    return None if x.shape[1] % block_k == 0 else "inputs must be whole blocks"


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Shapes as in the reference; ``block_k`` divides the inputs."""
    numbers, scales = quantise(x, block_k)
    wide = widened(numbers, scales)
    rows = scale if block_n == 1 else scale.repeat_interleave(block_n, dim=0)
    out = x.new_empty((len(x), len(weight)))
    step = max(1, PIECE // x.shape[1])
    for begin in range(0, len(weight), step):
        here = slice(begin, begin + step)
        part = None if bias is None else bias[here].float()
        out[:, here] = linear(wide, widened(weight[here], rows[here][: len(weight) - begin]), part)
    return out


def widened(numbers: Tensor, scales: Tensor) -> Tensor:
    """[N, K] float8_e4m3fn and [N, groups] to [N, K] float32. What is no number becomes 480."""
    bits = numbers.view(torch.uint8).to(torch.int16)
    halves = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).view(torch.float16)
    groups = halves.float().unflatten(1, (scales.shape[1], -1))
    return groups.mul_(scales.unsqueeze(2) * 256).flatten(1)

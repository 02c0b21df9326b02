"""Products with weights of four bits on a CPU: unpacked piece by piece, within the processor's
cache, and multiplied through oneDNN.

The weights keep the order in which they are packed, all lower halves of the bytes first; the
activations, of which there are fewer, are brought into that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reprise.ops.linear.onednn import linear
from reprise.ops.w4_linear.reference import MIDDLE, ORDER

PIECE = 1 << 18
"""Weights that are unpacked at once."""


def accepts(x: Tensor, group: int, **_: Any) -> str | None:
    return None if x.shape[1] % group == 0 else "inputs must be a multiple of the group"


def w4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """Shapes as in the reference; ``group`` divides the inputs."""
    inputs, groups = x.shape[1], scales.shape[1]
    words = x.reshape(len(x), -1, 8)
    halves = [words[:, :, list(ORDER[half::2])].flatten(1) for half in (0, 1)]
    turned = torch.cat(halves, dim=1)
    out = x.new_empty((len(x), len(packed)))
    step = max(1, PIECE // inputs)
    for begin in range(0, len(packed), step):
        here = slice(begin, begin + step)
        pairs = packed[here].view(torch.uint8)
        numbers = torch.stack((pairs & 15, pairs >> 4), dim=1)
        weight = numbers.float().view(-1, 2, groups, group // 2)
        weight -= MIDDLE if zeros is None else zeros[here].float().view(-1, 1, groups, 1)
        weight *= scales[here].float().view(-1, 1, groups, 1)
        part = None if bias is None else bias[here]
        out[:, here] = linear(turned, weight.view(-1, inputs).to(x.dtype), part)
    return out

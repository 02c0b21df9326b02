"""Whether equal results prove anything: those of a step whose numbers overflow do not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def extremes(results: Iterable[Tensor]) -> list[Tensor]:
    """Of each floating-point tensor that is not empty its least and its largest number, [2]."""
    found = [each for each in results if each.is_floating_point() and each.numel()]
    both = [torch.empty(2, dtype=each.dtype, device=each.device) for each in found]
    for each, (least, most) in zip(found, both, strict=True):
        torch.aminmax(each, out=(least, most))
    return both


def uninformative(extremes: Iterable[Tensor]) -> bool:
    """Whether a graph that goes wrong on the way could give these results too: some tensor is one
    number throughout, as where weights are yet to be loaded, or its largest number is not finite,
    as where weights overflow. (Its least may be infinite: logits of tokens that there are not.)

    Args:
        extremes: As of :func:`extremes`.
    """
    return not all(least < most < math.inf for least, most in (each.tolist() for each in extremes))

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Destination(NamedTuple):
    """Where a tensor of a checkpoint goes."""

    target: Tensor
    """To be filled."""
    part: tuple[slice, ...] = ()
    """Of the stored tensor, what goes there, with a step of 1; (): all of it."""
    shape: tuple[int, ...] | None = None
    """Of the stored tensor, where that is not the target's."""
    offset: float = 0.0
    """Added to what is stored, such as 1 where gains are stored as their distance from 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
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
    dtype: torch.dtype | None = None
    """Of the stored tensor, where that is not the target's."""
    convert: Callable[[Tensor], Tensor] | None = None
    """Makes what goes there of that part of the stored tensor, where it is stored in another
    layout: a tensor of the target's shape, on the device of the one that it gets."""
    optional: bool = False
    """The model can do without it."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.target.shape) if self.shape is None else self.shape

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.target.dtype if self.dtype is None else self.dtype


class Implied(NamedTuple):
    """What a checkpoint may have and goes nowhere, since all that it can say is known before."""

    stored_shape: tuple[int, ...]
    stored_dtype: torch.dtype
    check: Callable[[Tensor], str | None]
    """What is wrong with its values; None: it says what is known."""


Place = Destination | Implied

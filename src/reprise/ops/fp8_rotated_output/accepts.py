from __future__ import annotations

from typing import Any

from torch import Tensor

from reprise.ops.fp8_linear.accepts import STEP
from reprise.ops.implementation import Accepts


def of_one(accepts: Accepts) -> Accepts:
    """Asks whether the product of one group is accepted."""

    def asked(x: Tensor, weight: Tensor, block_k: int, **_: Any) -> str | None:
        return accepts(x=x.new_empty((0, weight.shape[1])), block_k=block_k)

    return asked


def in_one(x: Tensor, block_k: int, **_: Any) -> str | None:
    """Which calls the kernel that rotates and quantises computes."""
    if block_k != STEP or x.shape[2] % STEP:
        return f"heads must be a multiple of {STEP} wide, and scales of as many inputs"
    return None

from typing import Any

from torch import Tensor

STEP = 128
"""Inputs that the Triton kernels multiply at a time."""


def accepts(x: Tensor, block_k: int, **_: Any) -> str | None:
    """Which calls the Triton kernels compute."""
    if x.stride(1) != 1:
        return "elements of a row must lie side by side"
    if x.shape[1] % STEP:
        return f"inputs must be a multiple of {STEP}"
    if block_k not in (STEP, x.shape[1]):
        return f"scales are of {STEP} inputs, or of all"
    return None

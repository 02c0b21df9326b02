from typing import Any

from torch import Tensor

STEP = 128
"""Inputs that the Triton kernels multiply at a time."""


def accepts(x: Tensor, down: Tensor, block_k: int, **_: Any) -> str | None:
    """Which calls the Triton kernels compute."""
    if x.shape[1] % STEP or down.shape[2] % STEP:
        return f"inputs of both products must be a multiple of {STEP}"
    return None if block_k in (0, STEP) else f"scales are of {STEP} inputs, or of all"

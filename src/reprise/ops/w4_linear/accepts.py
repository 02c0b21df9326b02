from typing import Any

from torch import Tensor

STEP = 128
"""Inputs that the Triton kernels multiply at a time, at most."""
LEAST_GROUP = 32


def accepts(x: Tensor, group: int, **_: Any) -> str | None:
    """Which calls the Triton kernels compute."""
    if x.stride(1) != 1:
        return "elements of a row must lie side by side"
    inputs = x.shape[1]
    if inputs % STEP:
        return f"inputs must be a multiple of {STEP}"
    if inputs % group or group % LEAST_GROUP or (group % STEP and STEP % group):
        return f"groups must be of {LEAST_GROUP}, {STEP // 2} or a multiple of {STEP} inputs"
    return None

from torch import Tensor

STEP = 128
"""Inputs that the Triton kernels multiply at a time."""


def accepts(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> str | None:
    """Which calls the Triton kernels compute."""
    if x.shape[1] % STEP:
        return f"inputs must be a multiple of {STEP}"
    if block_k not in (STEP, x.shape[1]):
        return f"scales are of {STEP} inputs, or of all"
    return None

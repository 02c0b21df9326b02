# mypy: allow-untyped-defs, no-check-untyped-defs
"""What happens to scores, and where the keys of a tile are, whatever a cache holds."""

import triton
import triton.language as tl


@triton.jit
def capped(scores, scale, soft_cap):
    # tanh(x) = 1 - 2 / (exp(2x) + 1), which has the right limits.
    tanh = 1 - 2 / (tl.exp(scores * (2 * scale / soft_cap)) + 1)
    return soft_cap * tanh


@triton.jit
def masked(scores, key_position, there, position, window, WINDOWED: tl.constexpr):
    """-inf where a row does not see a key, whatever its score is."""
    visible = there[None, :] & (key_position[None, :] <= position[:, None])
    if WINDOWED:
        visible &= key_position[None, :] > (position - window)[:, None]
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def blocks(table_ptr, start, lowest, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, other=0):
    """[BLOCK_N] block of each key from ``start``; ``other``, the null block, for keys that are not
    there."""
    key_position = start + tl.arange(0, BLOCK_N)
    there = (key_position >= lowest) & (key_position < end)
    return tl.load(table_ptr + key_position // BLOCK_SIZE, mask=there, other=other)

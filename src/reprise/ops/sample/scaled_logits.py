# mypy: allow-untyped-defs, no-check-untyped-defs
"""Logits over the temperature, and what they weigh.

Masses are 64-bit fixed-point numbers with 40 fractional bits, relative to the likeliest token:
their sums are exact, whatever the order, so the draw does not depend on how the work is cut.
"""

import triton
import triton.language as tl


@triton.jit
def load_scaled(pointers, mask, temperature):
    """Scaled logits; -inf where masked."""
    return _scale(tl.load(pointers, mask=mask, other=-float("inf")), temperature)


@triton.jit
def _scale(logits, temperature):
    """Logits over the temperature (1 if greedy), bit for bit as the reference divides."""
    if (temperature != 0) & (temperature != 1):
        logits = tl.div_rn(logits, tl.zeros_like(logits) + temperature)
    return logits


@triton.jit
def load_block(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK: tl.constexpr):
    """[BLOCK] scaled logits from ``start`` on: of the candidates if ``compact``, else of the row.

    -inf from ``count`` on.
    """
    index = start + tl.arange(0, BLOCK)
    if compact:
        x = tl.load(candidates_ptr + index, mask=index < count, other=-float("inf"))
    else:
        x = load_scaled(logits_ptr + index, index < count, temperature)
    return x


@triton.jit
def fixed_mass(x, largest):
    """Fixed-point weight of the scaled logits ``x``: 1 at ``largest``."""
    return (tl.exp(x - largest) * 1099511627776.0).to(tl.int64)

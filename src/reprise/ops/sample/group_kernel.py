# mypy: allow-untyped-defs, no-check-untyped-defs
"""The one pass over the logits that every row needs, with many programs a row."""

import triton
import triton.language as tl

from reprise.ops.sample.scaled_logits import load_scaled


@triton.jit
def group_kernel(
    logits_ptr,
    temperature_ptr,
    maxima_ptr,
    masses_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
):
    """Maximum of each group's scaled logits, and its mass relative to that maximum."""
    PROGRAMS: tl.constexpr = (GROUPS + GROUPS_PER_PROGRAM - 1) // GROUPS_PER_PROGRAM
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    group = tl.program_id(0) % PROGRAMS * GROUPS_PER_PROGRAM + tl.arange(0, GROUPS_PER_PROGRAM)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    temperature = tl.load(temperature_ptr + row)
    scaled = load_scaled(logits_ptr + row * row_stride + token, token < VOCAB, temperature)
    maximum = tl.max(scaled, axis=1)
    tl.store(maxima_ptr + row * GROUPS + group, maximum, mask=group < GROUPS)
    if temperature != 0:
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)
        mass = tl.sum(tl.exp(scaled - shift[:, None]), axis=1)
        tl.store(masses_ptr + row * GROUPS + group, mass, mask=group < GROUPS)

# mypy: allow-untyped-defs, no-check-untyped-defs
"""The draw of a row's token from what the groups tell."""

import triton
import triton.language as tl

from reprise.ops.sample.scaled_logits import fixed_mass, load_block, load_scaled
from reprise.ops.sample.threshold import bound_by_count, bound_by_mass, collect, threshold


@triton.jit
def draw_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    maxima_ptr,
    masses_ptr,
    chosen_groups_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    out_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program draws the token of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    candidates_ptr += row * CAPACITY
    candidate_ids_ptr += row * CAPACITY
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    by_k = (top_k > 0) & (top_k < VOCAB)
    by_p = top_p < 1.0

    group = tl.arange(0, BLOCK_G)
    real_group = group < GROUPS
    maxima = tl.load(maxima_ptr + row * GROUPS + group, mask=real_group, other=-float("inf"))
    largest = tl.max(maxima)

    if temperature == 0:
        first = tl.min(tl.where(maxima == largest, group, GROUPS - 1))
        token = first * GROUP + tl.arange(0, GROUP)
        x = load_scaled(logits_ptr + token, token < VOCAB, temperature)
        best = tl.min(tl.where(x == largest, token, VOCAB - 1))
        tl.store(out_ptr + row, best.to(tl.int64))
        return

    uniform = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    masses = tl.load(masses_ptr + row * GROUPS + group, mask=real_group, other=0.0)
    relative = tl.where(maxima == -float("inf"), 0.0, masses * tl.exp(maxima - largest))
    group_mass = (relative * 1099511627776.0).to(tl.int64)

    if (not by_k) & (not by_p) & (min_p <= 0):
        target = _fraction(tl.sum(group_mass), uniform)
        cumulative = tl.cumsum(group_mass, axis=0)
        first = tl.min(tl.where(cumulative > target, group, GROUPS - 1))
        before = tl.sum(tl.where(group < first, group_mass, 0))
        token = first * GROUP + tl.arange(0, GROUP)
        x = load_scaled(logits_ptr + token, token < VOCAB, temperature)
        mass = tl.where(token < VOCAB, fixed_mass(x, largest), 0)
        passed = before + tl.cumsum(mass, axis=0) > target
        drawn = tl.min(tl.where(passed, token, VOCAB))
        # The group's mass was rounded once, its tokens' masses each: the target may lie between.
        last = tl.max(tl.where(mass > 0, token, 0))
        tl.store(out_ptr + row, tl.minimum(drawn, last).to(tl.int64))
        return

    floor = largest + tl.log(min_p) if min_p > 0 else -float("inf")
    # No token below the bound can be kept; this much the groups tell.
    bound = floor
    if by_k:
        bound = -float("inf")
        if top_k <= GROUPS:
            bound = bound_by_count(maxima, real_group, largest, top_k)
    elif by_p:
        bound = bound_by_mass(maxima, relative, largest, top_p, GROUP)
    chosen_groups_ptr += row * GROUPS
    found, _, _ = collect(
        logits_ptr, chosen_groups_ptr, candidates_ptr, candidate_ids_ptr, maxima, real_group,
        temperature, largest, bound, float("inf"), VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY,
    )  # fmt: skip
    compact = found <= CAPACITY
    count = tl.where(compact, found, VOCAB)

    cut = bound
    total = tl.sum(group_mass)
    # The nucleus is one of what top-k keeps. A loop: two copies would take a third more to compile.
    for by_mass in tl.range(2, loop_unroll_factor=1):
        if (by_p & (by_mass == 1)) | (by_k & (by_mass == 0)):
            mass = _fraction(total, (top_p * 16777216.0).to(tl.int64))
            cut = threshold(
                candidates_ptr, candidate_ids_ptr, logits_ptr, chosen_groups_ptr, maxima,
                real_group, compact, count, temperature, largest, cut,
                tl.where(by_mass == 1, mass, top_k.to(tl.int64)), by_mass == 1,
                VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY, BLOCK,
            )  # fmt: skip
            if by_mass == 0:
                total = _total_kept_mass(
                    candidates_ptr, logits_ptr, compact, count, temperature, largest, cut,
                    -float("inf"), BLOCK,
                )  # fmt: skip

    total = _total_kept_mass(
        candidates_ptr, logits_ptr, compact, count, temperature, largest, cut, floor, BLOCK
    )
    target = _fraction(total, uniform)
    passed = target * 0
    drawn = VOCAB
    for start in tl.range(0, count, BLOCK, num_stages=3):
        mass = _kept_mass(
            candidates_ptr, logits_ptr, compact, start, count, temperature, largest, cut, floor,
            BLOCK,
        )  # fmt: skip
        here = tl.sum(mass)
        if (passed <= target) & (passed + here > target):
            reached = passed + tl.cumsum(mass, axis=0) > target
            drawn = tl.min(tl.where(reached, start + tl.arange(0, BLOCK), VOCAB))
        passed += here
    # Nothing is found among logits that are all NaN; a token of the vocabulary it must be.
    drawn = tl.where(count > 0, tl.minimum(drawn, count - 1), VOCAB - 1)
    if compact & (count > 0):
        drawn = tl.load(candidate_ids_ptr + drawn)
    tl.store(out_ptr + row, drawn.to(tl.int64))


@triton.jit
def _kept_mass(
    candidates_ptr,
    logits_ptr,
    compact,
    start,
    count,
    temperature,
    largest,
    cut,
    floor,
    BLOCK: tl.constexpr,
):
    """[BLOCK] masses from ``start`` on; 0 for tokens below the cut or the floor."""
    x = load_block(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK)
    kept = (start + tl.arange(0, BLOCK) < count) & (x >= cut) & (x >= floor)
    return tl.where(kept, fixed_mass(x, largest), 0)


@triton.jit
def _total_kept_mass(
    candidates_ptr,
    logits_ptr,
    compact,
    count,
    temperature,
    largest,
    cut,
    floor,
    BLOCK: tl.constexpr,
):
    mass = tl.zeros([BLOCK], dtype=tl.int64)
    for start in tl.range(0, count, BLOCK, num_stages=3):
        mass += _kept_mass(
            candidates_ptr, logits_ptr, compact, start, count, temperature, largest, cut, floor,
            BLOCK,
        )  # fmt: skip
    return tl.sum(mass)


@triton.jit
def _fraction(total, numerator):
    """floor(total * numerator / 2**24) for ``total`` below 2**62 and ``numerator`` to 2**24."""
    return (total >> 24) * numerator + (((total & 0xFFFFFF) * numerator) >> 24)


@triton.jit
def _uniform(seed, position):
    """Numerator, over 2**24, of the row's uniform variate."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return (word >> 8).to(tl.int64)

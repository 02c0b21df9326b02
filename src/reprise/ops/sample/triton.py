"""Sampling in Triton, without a sort.

``_group_kernel`` reads the logits once, with many programs a row, and keeps the maximum and the
mass of each group of neighbouring tokens. ``_draw_kernel``, one program a row, works from these:
a greedy row needs one group's logits, an unfiltered row too, and a filtered row the few groups
whose maximum says that they may hold a kept token. Thresholds are found by bisection over the
bits of the scaled logits, as integers in the same order.

Masses are 64-bit fixed-point numbers with 40 fractional bits, relative to the likeliest token:
their sums are exact, whatever the order, so the draw does not depend on how the work is cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS_PER_PROGRAM = 32
_MOST_GROUPS = 2048
_CAPACITY = 4096
"""Tokens that may be kept as far as the groups tell; with more, the whole row is searched."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Arguments as in the reference; rows of ``logits`` may be strided."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    group = max(128, triton.next_power_of_2(triton.cdiv(vocab, _MOST_GROUPS)))
    groups = triton.cdiv(vocab, group)
    maxima = logits.new_empty((rows, groups), dtype=torch.float32)
    masses = logits.new_empty((rows, groups), dtype=torch.float32)
    chosen_groups = logits.new_empty((rows, groups), dtype=torch.int32)
    candidates = logits.new_empty((rows, _CAPACITY), dtype=torch.float32)
    candidate_ids = logits.new_empty((rows, _CAPACITY), dtype=torch.int32)
    out = logits.new_empty((rows,), dtype=torch.int64)
    programs = triton.cdiv(groups, _GROUPS_PER_PROGRAM)
    _group_kernel[(rows * programs,)](
        logits,
        temperature,
        maxima,
        masses,
        logits.stride(0),
        VOCAB=vocab,
        GROUP=group,
        GROUPS=groups,
        GROUPS_PER_PROGRAM=_GROUPS_PER_PROGRAM,
        num_warps=8,
    )
    _draw_kernel[(rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        maxima,
        masses,
        chosen_groups,
        candidates,
        candidate_ids,
        out,
        logits.stride(0),
        VOCAB=vocab,
        GROUP=group,
        GROUPS=groups,
        GROUPS_PER_STEP=max(1, _CAPACITY // group),
        BLOCK_G=triton.next_power_of_2(groups),
        CAPACITY=_CAPACITY,
        BLOCK=_CAPACITY,
        num_warps=8,
    )
    return out


@triton.jit
def _group_kernel(
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
    scaled = _load_scaled(
        logits_ptr + row * row_stride + token, token < VOCAB, tl.load(temperature_ptr + row)
    )
    maximum = tl.max(scaled, axis=1)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    mass = tl.sum(tl.exp(scaled - shift[:, None]), axis=1)
    tl.store(maxima_ptr + row * GROUPS + group, maximum, mask=group < GROUPS)
    tl.store(masses_ptr + row * GROUPS + group, mass, mask=group < GROUPS)


@triton.jit
def _scale(logits, temperature):
    """Logits over the temperature (1 if greedy), bit for bit as the reference divides."""
    divisor = tl.where(temperature == 0, 1.0, temperature)
    return tl.div_rn(logits, tl.zeros_like(logits) + divisor)


@triton.jit
def _load_scaled(pointers, mask, temperature):
    """Scaled logits; -inf where masked."""
    return _scale(tl.load(pointers, mask=mask, other=-float("inf")), temperature)


@triton.jit
def _values(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK: tl.constexpr):
    """[BLOCK] scaled logits from ``start`` on: of the candidates if ``compact``, else of the row.

    -inf from ``count`` on.
    """
    # Two masked loads, because some of Triton's backends cannot choose between two pointers.
    index = start + tl.arange(0, BLOCK)
    low = -float("inf")
    ours = tl.load(candidates_ptr + index, mask=index < tl.where(compact, count, 0), other=low)
    others = tl.load(logits_ptr + index, mask=index < tl.where(compact, 0, count), other=low)
    return _scale(tl.maximum(ours, others), temperature)


@triton.jit
def _key(x):
    """Integers in the order of the float32 ``x``; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(x, largest):
    """Fixed-point weight of the scaled logits ``x``: 1 at ``largest``."""
    return (tl.exp(x - largest) * 1099511627776.0).to(tl.int64)


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


@triton.jit
def _halvings(low, high):
    """Steps of bisection after which ``high`` is next to ``low``; more do no harm."""
    return tl.ceil(tl.log2((high - low).to(tl.float32))).to(tl.int32) + 1


@triton.jit
def _cut(
    candidates_ptr,
    logits_ptr,
    compact,
    count,
    temperature,
    largest,
    low,
    high,
    least,
    target,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Smallest key above which there is less than ``target``, counted in tokens or in mass.

    ``high`` is known to be such a key, ``low`` not to be. Tokens below ``least`` do not count.
    """
    for _ in range(_halvings(low, high)):
        middle = low + (high - low) // 2
        above = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(0, count, BLOCK):
            x = _values(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK)
            counts = (_key(x) > middle) & (_key(x) >= least)
            if BY_MASS:
                above += tl.where(counts, _mass(x, largest), 0)
            else:
                above += counts.to(tl.int64)
        if tl.sum(above) < target:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _bound_by_count(maxima, real, largest, top_k):
    """A bound that at least ``top_k`` tokens reach, as so many of the groups' maxima do."""
    low = tl.min(tl.where(real, _key(maxima), 0x7FFFFFFF)).to(tl.int64)
    high = _key(largest).to(tl.int64) + 1
    # The last bits are not worth the steps: a lower bound is as valid.
    for _ in range(_halvings(low, high) - 10):
        middle = low + (high - low) // 2
        if tl.sum((real & (_key(maxima) >= middle)).to(tl.int32)) >= top_k:
            low = middle
        else:
            high = middle
    bits = low.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bound_by_mass(maxima, masses, largest, top_p, GROUP: tl.constexpr):
    """A bound below which there is less than the mass that ``top_p`` leaves over.

    Below it lie at most the groups whose maximum does, whole, and of each other group what its
    largest token leaves, at most GROUP - 1 times the bound's mass.
    """
    heads = tl.exp(maxima - largest)
    # The margin is for rounding.
    rest = (1.0 - top_p - 2e-6) * tl.sum(masses)
    low = largest - 104.0
    high = largest
    for _ in range(12):
        middle = (low + high) * 0.5
        below = tl.minimum(masses - heads, (GROUP - 1) * tl.exp(middle - largest))
        below = tl.where(maxima < middle, masses, below)
        if tl.sum(below) <= rest:
            low = middle
        else:
            high = middle
    return tl.where(rest > 0, low, -float("inf"))


@triton.jit
def _collect(
    logits_ptr,
    groups_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    maxima,
    real,
    temperature,
    bound,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Write the logits and ids of the tokens that reach the bound, in vocabulary order.

    Returns how many they are; no more than CAPACITY are written.
    """
    chosen = real & (maxima >= bound)
    group_place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + group_place, tl.arange(0, BLOCK_G), mask=chosen)
    count = tl.sum(chosen.to(tl.int32))
    tl.debug_barrier()
    found = 0
    for start in range(0, count, GROUPS_PER_STEP):
        index = start + tl.arange(0, GROUPS_PER_STEP)
        group = tl.load(groups_ptr + index, mask=index < count, other=0)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (index < count)[:, None] & (token < VOCAB)
        logits = tl.load(logits_ptr + token, mask=inside, other=-float("inf"))
        reaches = (inside & (_scale(logits, temperature) >= bound)).to(tl.int32)
        hits = tl.sum(reaches, axis=1)
        before = found + tl.cumsum(hits, axis=0) - hits
        place = before[:, None] + tl.cumsum(reaches, axis=1) - 1
        keep = (reaches != 0) & (place < CAPACITY)
        tl.store(candidates_ptr + place, logits, mask=keep)
        tl.store(candidate_ids_ptr + place, token, mask=keep)
        found += tl.sum(hits)
    tl.debug_barrier()
    return found


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
    """[BLOCK] masses from ``start`` on; 0 for tokens below the cut (a key) or the floor."""
    x = _values(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK)
    kept = (start + tl.arange(0, BLOCK) < count) & (_key(x) >= cut) & (x >= floor)
    return tl.where(kept, _mass(x, largest), 0)


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
    for start in range(0, count, BLOCK):
        mass += _kept_mass(
            candidates_ptr, logits_ptr, compact, start, count, temperature, largest, cut, floor,
            BLOCK,
        )  # fmt: skip
    return tl.sum(mass)


@triton.jit
def _draw_kernel(
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
        x = _load_scaled(logits_ptr + token, token < VOCAB, temperature)
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
        x = _load_scaled(logits_ptr + token, token < VOCAB, temperature)
        mass = tl.where(token < VOCAB, _mass(x, largest), 0)
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
            bound = _bound_by_count(maxima, real_group, largest, top_k)
    elif by_p:
        bound = _bound_by_mass(maxima, relative, largest, top_p, GROUP)
    found = _collect(
        logits_ptr,
        chosen_groups_ptr + row * GROUPS,
        candidates_ptr,
        candidate_ids_ptr,
        maxima,
        real_group,
        temperature,
        bound,
        VOCAB,
        GROUP,
        GROUPS_PER_STEP,
        BLOCK_G,
        CAPACITY,
    )
    compact = found <= CAPACITY
    count = tl.where(compact, found, VOCAB)

    highest = _key(largest).to(tl.int64)
    cut = _key(bound).to(tl.int64)
    total = tl.sum(group_mass)
    if by_k:
        cut = _cut(
            candidates_ptr, logits_ptr, compact, count, temperature, largest,
            cut - 1, highest, cut, top_k.to(tl.int64), False, BLOCK,
        )  # fmt: skip
        total = _total_kept_mass(
            candidates_ptr, logits_ptr, compact, count, temperature, largest, cut,
            -float("inf"), BLOCK,
        )  # fmt: skip
    if by_p:
        cut = _cut(
            candidates_ptr, logits_ptr, compact, count, temperature, largest,
            cut - 1, highest, cut, _fraction(total, (top_p * 16777216.0).to(tl.int64)), True, BLOCK,
        )  # fmt: skip

    total = _total_kept_mass(
        candidates_ptr, logits_ptr, compact, count, temperature, largest, cut, floor, BLOCK
    )
    target = _fraction(total, uniform)
    passed = target * 0
    drawn = VOCAB
    for start in range(0, count, BLOCK):
        mass = _kept_mass(
            candidates_ptr, logits_ptr, compact, start, count, temperature, largest, cut, floor,
            BLOCK,
        )  # fmt: skip
        reached = passed + tl.cumsum(mass, axis=0) > target
        first = tl.min(tl.where(reached, start + tl.arange(0, BLOCK), VOCAB))
        drawn = tl.minimum(drawn, first)
        passed += tl.sum(mass)
    drawn = tl.minimum(drawn, count - 1)
    if compact:
        drawn = tl.load(candidate_ids_ptr + drawn)
    tl.store(out_ptr + row, drawn.to(tl.int64))

"""Sampling in Triton, without a sort.

``_group_kernel`` reads the logits once, with many programs a row, and keeps the maximum and the
mass of each group of neighbouring tokens. ``_draw_kernel``, one program a row, works from these:
a greedy row needs one group's logits, an unfiltered row too, and a filtered row the few groups
whose maximum says that they may hold a kept token. Thresholds are found by splitting the range of
the scaled logits in eight, again and again, down to the last bit.

Masses are 64-bit fixed-point numbers with 40 fractional bits, relative to the likeliest token:
their sums are exact, whatever the order, so the draw does not depend on how the work is cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS_PER_PROGRAM = 32
_MOST_GROUPS = 2048
_CAPACITY = 16384
"""Tokens that may be kept as far as the groups tell; with more, the whole row is searched."""
_BLOCK = 1024
"""Tokens of one step of a search."""


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
    capacity = min(_CAPACITY, groups * group)
    candidates = logits.new_empty((rows, capacity), dtype=torch.float32)
    candidate_ids = logits.new_empty((rows, capacity), dtype=torch.int32)
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
        GROUPS_PER_STEP=max(1, 4096 // group),
        BLOCK_G=triton.next_power_of_2(groups),
        CAPACITY=capacity,
        BLOCK=_BLOCK,
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
    temperature = tl.load(temperature_ptr + row)
    scaled = _load_scaled(logits_ptr + row * row_stride + token, token < VOCAB, temperature)
    maximum = tl.max(scaled, axis=1)
    tl.store(maxima_ptr + row * GROUPS + group, maximum, mask=group < GROUPS)
    if temperature != 0:
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)
        mass = tl.sum(tl.exp(scaled - shift[:, None]), axis=1)
        tl.store(masses_ptr + row * GROUPS + group, mass, mask=group < GROUPS)


@triton.jit
def _scale(logits, temperature):
    """Logits over the temperature (1 if greedy), bit for bit as the reference divides."""
    if (temperature != 0) & (temperature != 1):
        logits = tl.div_rn(logits, tl.zeros_like(logits) + temperature)
    return logits


@triton.jit
def _load_scaled(pointers, mask, temperature):
    """Scaled logits; -inf where masked."""
    return _scale(tl.load(pointers, mask=mask, other=-float("inf")), temperature)


@triton.jit
def _values(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK: tl.constexpr):
    """[BLOCK] scaled logits from ``start`` on: of the candidates if ``compact``, else of the row.

    -inf from ``count`` on.
    """
    index = start + tl.arange(0, BLOCK)
    if compact:
        x = tl.load(candidates_ptr + index, mask=index < count, other=-float("inf"))
    else:
        x = _load_scaled(logits_ptr + index, index < count, temperature)
    return x


@triton.jit
def _key(x):
    """Integers in the order of the float32 ``x``; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


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
    """Steps of bisection after which ``high`` is next to ``low``."""
    return tl.ceil(tl.log2((high - low).to(tl.float32))).to(tl.int32) + 1


@triton.jit
def _cut(
    candidates_ptr,
    logits_ptr,
    compact,
    count,
    temperature,
    largest,
    least,
    low,
    high,
    target,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Smallest number above which there is less than ``target``, counted in tokens or in mass.

    It lies above the key ``low`` and not above the key ``high``. Tokens below ``least`` do not
    count.
    """
    way = tl.arange(0, 8)
    for _ in range(_halvings(low, high) // 3 + 1):
        pivots = low + (high - low) * (way + 1) // 8
        above = tl.zeros([BLOCK, 8], dtype=tl.int64)
        for start in range(0, count, BLOCK):
            x = _values(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK)
            if BY_MASS:
                weight = tl.where(x >= least, _mass(x, largest), 0)
            else:
                weight = (x >= least).to(tl.int64)
            above += tl.where(x[:, None] > _number(pivots)[None, :], weight[:, None], 0)
        too_much = tl.sum(above, axis=0) >= target
        low = tl.max(tl.where(too_much, pivots, low))
        high = tl.min(tl.where(too_much, high, pivots))
    return _number(high)


@triton.jit
def _narrow(
    logits_ptr,
    temperature,
    largest,
    least,
    target,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two numbers that have :func:`_cut`'s result between them, much closer than the row's.

    Two passes over the row in float32, each for 8 equal parts of the range; where float32 cannot
    tell, the range stays wider.
    """
    way = tl.arange(0, 8)[None, :]
    low = tl.maximum(least, largest - 104.0)
    high = largest
    for _ in range(2):
        pivots = low + (high - low) * ((way + 1) * 0.125)
        above = tl.zeros([BLOCK, 8], dtype=tl.float32)
        for start in tl.range(0, VOCAB, BLOCK, num_stages=3):
            index = start + tl.arange(0, BLOCK)[:, None]
            x = _load_scaled(logits_ptr + index, index < VOCAB, temperature)
            if BY_MASS:
                weight = tl.where(x >= least, tl.exp(x - largest), 0.0)
            else:
                weight = tl.where(x >= least, 1.0, 0.0)
            above += tl.where(x > pivots, weight, 0.0)
        found = tl.sum(above, axis=0)[None, :]
        goal = target.to(tl.float32)
        if BY_MASS:
            goal = goal / 1099511627776.0
        # Nothing is above ``largest``, so the last pivot of a first pass holds for certain.
        low = tl.max(tl.where(found > goal * 1.0001, pivots, low))
        high = tl.min(tl.where(found < goal * 0.9999, pivots, high))
    return low, high


@triton.jit
def _threshold(
    candidates_ptr,
    candidate_ids_ptr,
    logits_ptr,
    groups_ptr,
    maxima,
    real,
    compact,
    count,
    temperature,
    largest,
    least,
    target,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Smallest number above which there is less than ``target``; it lies from ``least`` on.

    If the candidates did not fit their list, the list is used for those near the threshold.
    """
    low = tl.maximum(_key(least) - 1, _key(-float("inf")))
    high = _key(largest)
    listed = compact
    if compact == 0:
        near, far = _narrow(logits_ptr, temperature, largest, least, target, BY_MASS, VOCAB, BLOCK)
        found, tokens, mass = _collect(
            logits_ptr, groups_ptr, candidates_ptr, candidate_ids_ptr, maxima, real, temperature,
            largest, near, far, VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY,
        )  # fmt: skip
        low = tl.maximum(_key(near) - 1, low)
        high = _key(far)
        if found <= CAPACITY:
            listed = found <= CAPACITY
            count = found
            target -= mass if BY_MASS else tokens
    return _cut(
        candidates_ptr, logits_ptr, listed, count, temperature, largest, least, low, high, target,
        BY_MASS, BLOCK,
    )  # fmt: skip


@triton.jit
def _bound_by_count(maxima, real, largest, top_k):
    """A bound that at least ``top_k`` tokens reach, as so many of the groups' maxima do."""
    low = _key(tl.min(tl.where(real, maxima, float("inf"))))
    high = _key(largest) + 1
    # The last bits are not worth the steps: a lower bound is as valid.
    for _ in range(_halvings(low, high) - 12):
        middle = low + (high - low) // 2
        if tl.sum((real & (maxima >= _number(middle))).to(tl.int32)) >= top_k:
            low = middle
        else:
            high = middle
    return _number(low)


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
    largest,
    bound,
    top,
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Write the scaled logits and ids of the tokens from ``bound`` to ``top``, in their order.

    Returns how many they are, and the number and the mass of the tokens above ``top``. If they are
    more than CAPACITY, not all are written and the results say no more than that.
    """
    chosen = real & (maxima >= bound)
    group_place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + group_place, tl.arange(0, BLOCK_G), mask=chosen)
    count = tl.sum(chosen.to(tl.int32))
    tl.debug_barrier()
    found = 0
    tokens = tl.zeros([], dtype=tl.int64)
    mass = tl.zeros([], dtype=tl.int64)
    for start in range(0, count, GROUPS_PER_STEP):
        index = start + tl.arange(0, GROUPS_PER_STEP)
        group = tl.load(groups_ptr + index, mask=index < count, other=0)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (index < count)[:, None] & (token < VOCAB)
        if found <= CAPACITY:
            x = _load_scaled(logits_ptr + token, inside, temperature)
            reaches = (inside & (x >= bound) & (x <= top)).to(tl.int32)
            hits = tl.sum(reaches, axis=1)
            before = found + tl.cumsum(hits, axis=0) - hits
            place = before[:, None] + tl.cumsum(reaches, axis=1) - 1
            keep = (reaches != 0) & (place < CAPACITY)
            tl.store(candidates_ptr + place, x, mask=keep)
            tl.store(candidate_ids_ptr + place, token, mask=keep)
            found += tl.sum(hits)
            if top < largest:
                above = inside & (x > top)
                tokens += tl.sum(tl.sum(above.to(tl.int64), axis=1))
                mass += tl.sum(tl.sum(tl.where(above, _mass(x, largest), 0), axis=1))
    tl.debug_barrier()
    return found, tokens, mass


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
    x = _values(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK)
    kept = (start + tl.arange(0, BLOCK) < count) & (x >= cut) & (x >= floor)
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
    for start in tl.range(0, count, BLOCK, num_stages=3):
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
    chosen_groups_ptr += row * GROUPS
    found, _, _ = _collect(
        logits_ptr, chosen_groups_ptr, candidates_ptr, candidate_ids_ptr, maxima, real_group,
        temperature, largest, bound, float("inf"), VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY,
    )  # fmt: skip
    compact = found <= CAPACITY
    count = tl.where(compact, found, VOCAB)

    cut = bound
    total = tl.sum(group_mass)
    if by_k:
        cut = _threshold(
            candidates_ptr, candidate_ids_ptr, logits_ptr, chosen_groups_ptr, maxima, real_group,
            compact, count, temperature, largest, cut, top_k.to(tl.int64),
            False, VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY, BLOCK,
        )  # fmt: skip
        total = _total_kept_mass(
            candidates_ptr, logits_ptr, compact, count, temperature, largest, cut,
            -float("inf"), BLOCK,
        )  # fmt: skip
    if by_p:
        target = _fraction(total, (top_p * 16777216.0).to(tl.int64))
        cut = _threshold(
            candidates_ptr, candidate_ids_ptr, logits_ptr, chosen_groups_ptr, maxima, real_group,
            compact, count, temperature, largest, cut, target,
            True, VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY, BLOCK,
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
    drawn = tl.minimum(drawn, count - 1)
    if compact:
        drawn = tl.load(candidate_ids_ptr + drawn)
    tl.store(out_ptr + row, drawn.to(tl.int64))

# mypy: allow-untyped-defs, no-check-untyped-defs
"""Which tokens a filter keeps.

From the groups' maxima and masses follows a bound below which no token can be kept; tokens from it
on are collected into a list of candidates. The threshold between kept and dropped is found among
them by splitting the range of the scaled logits in eight, again and again, down to the last bit.
"""

import triton
import triton.language as tl

from reprise.ops.sample.scaled_logits import fixed_mass, load_block, load_scaled


@triton.jit
def bound_by_count(maxima, real, largest, top_k):
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
def bound_by_mass(maxima, masses, largest, top_p, GROUP: tl.constexpr):
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
def collect(
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
            x = load_scaled(logits_ptr + token, inside, temperature)
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
                mass += tl.sum(tl.sum(tl.where(above, fixed_mass(x, largest), 0), axis=1))
    tl.debug_barrier()
    return found, tokens, mass


@triton.jit
def threshold(
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
    by_mass,
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
        near, far = _narrow(logits_ptr, temperature, largest, least, target, by_mass, VOCAB, BLOCK)
        found, tokens, mass = collect(
            logits_ptr, groups_ptr, candidates_ptr, candidate_ids_ptr, maxima, real, temperature,
            largest, near, far, VOCAB, GROUP, GROUPS_PER_STEP, BLOCK_G, CAPACITY,
        )  # fmt: skip
        low = tl.maximum(_key(near) - 1, low)
        high = _key(far)
        if found <= CAPACITY:
            listed = found <= CAPACITY
            count = found
            target -= tl.where(by_mass, mass, tokens)
    return _cut(
        candidates_ptr, logits_ptr, listed, count, temperature, largest, least, low, high, target,
        by_mass, BLOCK,
    )  # fmt: skip


@triton.jit
def _narrow(
    logits_ptr,
    temperature,
    largest,
    least,
    target,
    by_mass,
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
            x = load_scaled(logits_ptr + index, index < VOCAB, temperature)
            weight = (x >= least).to(tl.float32)
            if by_mass:
                weight = tl.where(x >= least, tl.exp(x - largest), 0.0)
            above += tl.where(x > pivots, weight, 0.0)
        found = tl.sum(above, axis=0)[None, :]
        goal = target.to(tl.float32)
        goal = tl.where(by_mass, goal / 1099511627776.0, goal)
        # Nothing is above ``largest``, so the last pivot of a first pass holds for certain.
        low = tl.max(tl.where(found > goal * 1.0001, pivots, low))
        high = tl.min(tl.where(found < goal * 0.9999, pivots, high))
    return low, high


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
    by_mass,
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
            x = load_block(candidates_ptr, logits_ptr, compact, start, count, temperature, BLOCK)
            weight = (x >= least).to(tl.int64)
            if by_mass:
                weight = tl.where(x >= least, fixed_mass(x, largest), 0)
            above += tl.where(x[:, None] > _number(pivots)[None, :], weight[:, None], 0)
        too_much = tl.sum(above, axis=0) >= target
        low = tl.max(tl.where(too_much, pivots, low))
        high = tl.min(tl.where(too_much, high, pivots))
    return _number(high)


@triton.jit
def _halvings(low, high):
    """Steps of bisection after which ``high`` is next to ``low``."""
    return tl.ceil(tl.log2((high - low).to(tl.float32))).to(tl.int32) + 1


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

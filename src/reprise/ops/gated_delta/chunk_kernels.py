# mypy: allow-untyped-defs, no-check-untyped-defs
"""The gated delta rule chunk by chunk, for prompts.

``delta_chunk_kernel`` makes of each chunk, all chunks at once, what its updates and answers need of
the state before it; ``delta_scan_kernel`` takes the state of each request through its chunks. In
the notation of :mod:`reprise.ops.gated_delta.chunked`, with S [K, V] the state before a chunk::

    update = own - of_state S;  answers = from_state S + seen update
    S <- exp(last) * S + kept^T update
"""

import triton
import triton.language as tl

from reprise.ops.gated_delta.recurrent_kernel import committed, log_decay, sigmoid
from reprise.ops.triton_util import depend

CHUNK = tl.constexpr(64)
LEVELS = tl.constexpr(6)
"""Two to the power of which is CHUNK."""


@triton.jit
def _chunks_of(starts_ptr, lengths_ptr, requests, SHORT: tl.constexpr, REQUESTS: tl.constexpr):
    """Chunks of each request [REQUESTS]; none of those that are padding, or short."""
    number = tl.arange(0, REQUESTS)
    real = number < requests
    begin = tl.load(starts_ptr + number, mask=real, other=0)
    count = tl.load(starts_ptr + 1 + number, mask=real, other=0) - begin
    length = tl.load(lengths_ptr + number, mask=real, other=0)
    return tl.where((length > 0) & (count > SHORT), (count + CHUNK - 1) // CHUNK, 0)


@triton.jit
def _times(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b, float32. The interpreter multiplies float32 correctly and bfloat16 as integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _inverse(lower, i, j, PRECISION: tl.constexpr):
    """Of I + lower, which is strictly lower triangular [CHUNK, CHUNK].

    Blocks on the diagonal, twice as large each time: below the inverses A and B of two neighbours
    comes -B C A, where C is what ``lower`` has there.
    """
    inverse = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -lower, 0.0))
    for level in tl.static_range(1, LEVELS):
        size = 1 << level
        below = (i // (2 * size) == j // (2 * size)) & (i // size != j // size)
        between = _times(inverse, tl.where(below, lower, 0.0), PRECISION, False)
        inverse -= _times(between, inverse, PRECISION, False)
    return inverse


@triton.jit
def _keys(ptr, real):
    """Of unit length, float32."""
    key = tl.load(ptr, mask=real, other=0.0).to(tl.float32)
    return key * tl.rsqrt(tl.sum(key * key, axis=1) + 1e-6)[:, None]


@triton.jit(do_not_specialize=["requests"])
def delta_chunk_kernel(
    qkv_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    starts_ptr,
    lengths_ptr,
    own_ptr,
    of_state_ptr,
    from_state_ptr,
    kept_ptr,
    seen_ptr,
    last_ptr,
    qkv_stride,
    a_stride,
    b_stride,
    requests,
    SHORT: tl.constexpr,
    REQUESTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program prepares a chunk of a request for a head."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    counts = _chunks_of(starts_ptr, lengths_ptr, requests, SHORT, REQUESTS)
    ends = tl.cumsum(counts, axis=0)
    number = tl.arange(0, REQUESTS)
    request = tl.sum((ends <= chunk).to(tl.int32), axis=0)
    first = tl.sum(tl.where(number < request, counts, 0), axis=0)
    depend(EARLY)
    if request < requests:
        begin = tl.load(starts_ptr + request) + (chunk - first) * CHUNK
        new = tl.minimum(tl.load(starts_ptr + request + 1) - begin, CHUNK)
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        width: tl.constexpr = HEADS // GROUP * KEYS
        place = tl.arange(0, CHUNK)
        i = place[:, None]
        j = place[None, :]
        token = (begin + place).to(tl.int64)
        there = place < new
        k = tl.arange(0, BLOCK_K)[None, :]
        rows = qkv_ptr + token[:, None] * qkv_stride
        real = there[:, None] & (k < KEYS)

        a_log = tl.load(a_log_ptr + head).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
        decay = log_decay(
            tl.load(a_ptr + token * a_stride + head, mask=there, other=0.0), a_log, dt_bias
        )
        # Tokens behind the request's last one decay nothing and write nothing.
        decay = tl.where(there, decay, 0.0)
        beta = sigmoid(tl.load(b_ptr + token * b_stride + head, mask=there, other=0.0))
        beta = tl.where(there, beta, 0.0)
        # Of strong decays the sums are large, and what matters is how little some differ: sums of
        # multiples of 1/256 are exact, those of the rests are small.
        decay = tl.maximum(decay, -256.0)
        coarse = tl.floor(decay * 256.0) * (1.0 / 256.0)
        rest = decay - coarse
        sums, rests = tl.cumsum(coarse, axis=0), tl.cumsum(rest, axis=0)
        all_sum, all_rest = tl.sum(coarse, axis=0), tl.sum(rest, axis=0)
        last = tl.exp(all_sum + all_rest)
        # Differences of sums before they are raised: a sum alone need not be representable.
        gap = (sums[:, None] - sums[None, :]) + (rests[:, None] - rests[None, :])
        ratio = tl.exp(tl.where(i >= j, gap, -float("inf")))
        until = tl.exp((all_sum - sums) + (all_rest - rests))
        since = tl.exp(sums + rests)

        # What needs the keys comes before the inverse and behind it, which leaves no registers.
        key = _keys(rows + width + head // GROUP * KEYS + k, real)
        narrow = key.to(dtype)
        at = (chunk * HEADS + head).to(tl.int64)
        wide = at * CHUNK * BLOCK_K + i * BLOCK_K + k
        tl.store(kept_ptr + wide, (key * until[:, None]).to(dtype))
        query = tl.load(rows + head // GROUP * KEYS + k, mask=real, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(query * query, axis=1) + 1e-6) * KEYS**-0.5
        query = query * scale[:, None]
        tl.store(from_state_ptr + wide, (query * since[:, None]).to(dtype))
        seen = _times(query.to(dtype), tl.trans(narrow), PRECISION, WIDEN) * ratio
        tl.store(seen_ptr + at * CHUNK * CHUNK + i * CHUNK + j, seen.to(dtype))
        lower = _times(narrow, tl.trans(narrow), PRECISION, WIDEN) * beta[:, None] * ratio
        inverse = _inverse(tl.where(i > j, lower, 0.0), i, j, PRECISION).to(dtype)
        key = _keys(rows + width + head // GROUP * KEYS + k, real)
        weighted = (key * (beta * since)[:, None]).to(dtype)
        of_state = _times(inverse, weighted, PRECISION, WIDEN)
        tl.store(of_state_ptr + wide, of_state.to(dtype))

        v = tl.arange(0, BLOCK_V)[None, :]
        value = tl.load(
            rows + 2 * width + head * VALUES + v, mask=there[:, None] & (v < VALUES), other=0.0
        )
        value = (value.to(tl.float32) * beta[:, None]).to(dtype)
        own = _times(inverse, value, PRECISION, WIDEN)
        tl.store(own_ptr + at * CHUNK * BLOCK_V + i * BLOCK_V + v, own.to(dtype))
        tl.store(last_ptr + at, last)


@triton.jit(do_not_specialize=["requests"])
def delta_scan_kernel(
    own_ptr,
    of_state_ptr,
    from_state_ptr,
    kept_ptr,
    seen_ptr,
    last_ptr,
    state_ptr,
    recent_ptr,
    gates_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    fresh_ptr,
    accepted_ptr,
    out_ptr,
    slot_stride,
    recent_stride,
    gates_stride,
    slots_stride,
    requests,
    SHORT: tl.constexpr,
    REQUESTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALL_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes BLOCK_V channels of a head's state through the chunks of a request."""
    row = tl.program_id(2)
    head = tl.program_id(1)
    counts = _chunks_of(starts_ptr, lengths_ptr, requests, SHORT, REQUESTS)
    number = tl.arange(0, REQUESTS)
    count = tl.sum(tl.where(number == row, counts, 0), axis=0)
    first = tl.sum(tl.where(number < row, counts, 0), axis=0)
    depend(EARLY)
    if count > 0:
        dtype: tl.constexpr = own_ptr.dtype.element_ty
        begin = tl.load(starts_ptr + row)
        new = tl.load(starts_ptr + row + 1) - begin
        slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
        old = tl.load(fresh_ptr + row) == 0
        k = tl.arange(0, BLOCK_K)
        v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        i = tl.arange(0, CHUNK)[:, None]
        at = state_ptr + slot * slot_stride + (head * VALUES + v)[:, None] * KEYS + k[None, :]
        real = (v < VALUES)[:, None] & (k < KEYS)[None, :]
        now = tl.load(at, mask=real & (k < tl.where(old, KEYS, 0))[None, :], other=0.0)
        now = now.to(tl.float32)
        if recent_ptr is not None:
            accepted = tl.where(old, tl.load(accepted_ptr + row), 0)
            now = committed(
                now, recent_ptr, gates_ptr, accepted, recent_stride, gates_stride, slot, head,
                k, v, GROUP, HEADS, KEYS, VALUES,
            )  # fmt: skip
        # [V, K] in memory.
        now = tl.trans(now)
        keys = i * BLOCK_K + k[None, :]
        values = i * ALL_V + v[None, :]
        square = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        for chunk in range(count):
            place = ((first + chunk) * HEADS + head).to(tl.int64)
            before = now.to(dtype)
            of_state = tl.load(of_state_ptr + place * CHUNK * BLOCK_K + keys)
            own = tl.load(own_ptr + place * CHUNK * ALL_V + values).to(tl.float32)
            update = (own - _times(of_state, before, PRECISION, WIDEN)).to(dtype)
            from_state = tl.load(from_state_ptr + place * CHUNK * BLOCK_K + keys)
            seen = tl.load(seen_ptr + place * CHUNK * CHUNK + square)
            answer = _times(from_state, before, PRECISION, WIDEN)
            answer += _times(seen, update, PRECISION, WIDEN)
            kept = tl.load(kept_ptr + place * CHUNK * BLOCK_K + keys)
            now = now * tl.load(last_ptr + place)
            now += _times(tl.trans(kept), update, PRECISION, WIDEN)
            token = chunk * CHUNK + i
            target = out_ptr + ((begin + token).to(tl.int64) * HEADS + head) * VALUES + v[None, :]
            inside = (token < new) & (v < VALUES)[None, :]
            tl.store(target, answer.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(at, tl.trans(now).to(state_ptr.dtype.element_ty), mask=real)

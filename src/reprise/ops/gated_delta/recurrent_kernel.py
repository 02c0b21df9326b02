# mypy: allow-untyped-defs, no-check-untyped-defs
"""The gated delta rule token by token: decodes, and requests with few new tokens in other steps."""

import triton
import triton.language as tl

from reprise.ops.triton_util import depend


@triton.jit
def log_decay(a, a_log, dt_bias):
    """``-exp(a_log) * softplus(a + dt_bias)``, float32."""
    x = a.to(tl.float32) + dt_bias
    return -tl.exp(a_log) * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x.to(tl.float32)))


@triton.jit
def _carried_on(now, key, value, decay, beta):
    """The state [V, K] behind one token more, whose key is not normalised yet."""
    key = key.to(tl.float32)
    key = key * tl.rsqrt(tl.sum(key * key, axis=0) + 1e-6)
    now = now * tl.exp(decay)
    error = value.to(tl.float32) - tl.sum(now * key[None, :], axis=1)
    return now + (beta * error)[:, None] * key[None, :]


@triton.jit
def committed(
    now, recent_ptr, gates_ptr, accepted, recent_stride, gates_stride, slot, head, k, v,
    GROUP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A slot's state, carried over the first ``accepted`` tokens of those that it keeps."""
    width: tl.constexpr = HEADS // GROUP * KEYS
    row = recent_ptr + slot * recent_stride
    gate = gates_ptr + slot * gates_stride + head
    for token in range(accepted):
        at = row + token * (width + HEADS * VALUES)
        key = tl.load(at + head // GROUP * KEYS + k, mask=k < KEYS, other=0.0)
        value = tl.load(at + width + head * VALUES + v, mask=v < VALUES, other=0.0)
        decay = tl.load(gate + token * 2 * HEADS)
        beta = tl.load(gate + (token * 2 + 1) * HEADS)
        now = _carried_on(now, key, value, decay, beta)
    return now


@triton.jit
def _token(
    now, qkv_ptr, a_ptr, b_ptr, out_ptr, a_log, dt_bias, token, head,
    qkv_stride, a_stride, b_stride, k, v,
    GROUP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One token: the state behind it; its answer is stored."""
    width: tl.constexpr = HEADS // GROUP * KEYS
    row = qkv_ptr + token * qkv_stride
    of_key = head // GROUP * KEYS + k
    query = tl.load(row + of_key, mask=k < KEYS, other=0.0).to(tl.float32)
    key = tl.load(row + width + of_key, mask=k < KEYS, other=0.0)
    value = tl.load(row + 2 * width + head * VALUES + v, mask=v < VALUES, other=0.0)
    decay = log_decay(tl.load(a_ptr + token * a_stride + head), a_log, dt_bias)
    beta = sigmoid(tl.load(b_ptr + token * b_stride + head))
    query = query * (tl.rsqrt(tl.sum(query * query, axis=0) + 1e-6) * KEYS**-0.5)
    now = _carried_on(now, key, value, decay, beta)
    answer = tl.sum(now * query[None, :], axis=1)
    target = out_ptr + (token * HEADS + head) * VALUES + v
    tl.store(target, answer.to(out_ptr.dtype.element_ty), mask=v < VALUES)
    return now


@triton.jit
def delta_tokens_kernel(
    qkv_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    state_ptr,
    recent_ptr,
    gates_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    fresh_ptr,
    accepted_ptr,
    known_ptr,
    out_ptr,
    qkv_stride,
    a_stride,
    b_stride,
    slot_stride,
    recent_stride,
    gates_stride,
    slots_stride,
    EACH: tl.constexpr,
    MOST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_V channels of a head for a request.

    EACH: how many rows each request has, padding too. 0: requests with more new tokens than MOST
    are left to others, and out is zero where nobody writes.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    live = tl.load(lengths_ptr + row) > 0
    start = tl.load(starts_ptr + row).to(tl.int64)
    count = (tl.load(starts_ptr + row + 1) - start).to(tl.int32)
    old = live & (tl.load(fresh_ptr + row) == 0)
    slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    # Padding has no channels, and who is fresh none that are old.
    place = (head * VALUES + v)[:, None] * KEYS + k[None, :]
    at = state_ptr + slot * slot_stride + place
    real = (v < VALUES)[:, None] & (k[None, :] < KEYS)
    depend(EARLY)
    if live & (count > 0) & ((EACH > 0) | (count <= MOST)):
        now = tl.load(at, mask=real & (k[None, :] < tl.where(old, KEYS, 0)), other=0.0)
        now = now.to(tl.float32)
        if recent_ptr is not None:
            accepted = tl.where(old, tl.load(accepted_ptr + row), 0)
            now = committed(
                now, recent_ptr, gates_ptr, accepted, recent_stride, gates_stride, slot, head,
                k, v, GROUP, HEADS, KEYS, VALUES,
            )  # fmt: skip
            # Who verifies leaves the state before its tokens, others the one behind them.
            verifies = k[None, :] < tl.where(tl.load(known_ptr + row) == 0, KEYS, 0)
            tl.store(at, now.to(state_ptr.dtype.element_ty), mask=real & verifies)
            real = real & (verifies == 0)
        for token in range(1 if EACH == 1 else count):
            now = _token(
                now, qkv_ptr, a_ptr, b_ptr, out_ptr, a_log, dt_bias, start + token, head,
                qkv_stride, a_stride, b_stride, k, v, GROUP, HEADS, KEYS, VALUES,
            )  # fmt: skip
        tl.store(at, now.to(state_ptr.dtype.element_ty), mask=real)
    elif EACH > 0:
        zeros = tl.zeros([BLOCK_V], dtype=out_ptr.dtype.element_ty)
        for token in range(EACH):
            target = out_ptr + ((row * EACH + token) * HEADS + head) * VALUES + v
            tl.store(target, zeros, mask=v < VALUES)


@triton.jit
def delta_keep_kernel(
    qkv_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    recent_ptr,
    gates_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    known_ptr,
    places_ptr,
    qkv_stride,
    a_stride,
    b_stride,
    recent_stride,
    gates_stride,
    slots_stride,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program keeps BLOCK channels of a request's token number ``program_id(1)``, or zeros if
    it is none of which the next step finds out whether it counts; the first also its gates."""
    row = tl.program_id(0)
    number = tl.program_id(1)
    live = tl.load(lengths_ptr + row) > 0
    start = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - start
    slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
    # All kernels before have read what is overwritten here.
    depend(EARLY)
    if live & (count > 0):
        verified = (tl.load(known_ptr + row) == 0) & (number < count)
        read = tl.load(places_ptr + start + tl.minimum(number, count - 1)) != 0
        there = verified & read
        token = (start + number).to(tl.int64)
        width: tl.constexpr = HEADS // GROUP * KEYS
        kept: tl.constexpr = width + HEADS * VALUES
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        new = qkv_ptr + token * qkv_stride + width + column
        x = tl.load(new, mask=column < tl.where(there, kept, 0), other=0.0)
        target = recent_ptr + slot * recent_stride + number * kept + column
        tl.store(target, x, mask=column < kept)
        if tl.program_id(2) == 0:
            head = tl.arange(0, BLOCK_H)
            real = head < HEADS
            some = head < tl.where(there, HEADS, 0)
            a_log = tl.load(a_log_ptr + head, mask=real, other=0.0).to(tl.float32)
            dt_bias = tl.load(dt_bias_ptr + head, mask=real, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + token * a_stride + head, mask=some, other=0.0)
            b = tl.load(b_ptr + token * b_stride + head, mask=some, other=0.0)
            gate = gates_ptr + slot * gates_stride + number * 2 * HEADS + head
            tl.store(gate, tl.where(some, log_decay(a, a_log, dt_bias), 0.0), mask=real)
            tl.store(gate + HEADS, tl.where(some, sigmoid(b), 0.0), mask=real)

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
    key = tl.load(row + width + of_key, mask=k < KEYS, other=0.0).to(tl.float32)
    value = tl.load(row + 2 * width + head * VALUES + v, mask=v < VALUES, other=0.0)
    decay = log_decay(tl.load(a_ptr + token * a_stride + head), a_log, dt_bias)
    beta = sigmoid(tl.load(b_ptr + token * b_stride + head))
    query = query * (tl.rsqrt(tl.sum(query * query, axis=0) + 1e-6) * KEYS**-0.5)
    key = key * tl.rsqrt(tl.sum(key * key, axis=0) + 1e-6)
    now = now * tl.exp(decay)
    error = value.to(tl.float32) - tl.sum(now * key[None, :], axis=1)
    now += (beta * error)[:, None] * key[None, :]
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
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    fresh_ptr,
    out_ptr,
    qkv_stride,
    a_stride,
    b_stride,
    slot_stride,
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

    MOST 1: each request has one row of its own, padding too. Else requests with more new tokens
    than MOST are left to others, and out is zero where nobody writes.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    live = tl.load(lengths_ptr + row) > 0
    start = tl.load(starts_ptr + row).to(tl.int64)
    count = tl.load(starts_ptr + row + 1) - start
    old = live & (tl.load(fresh_ptr + row) == 0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    a_log = tl.load(a_log_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    # Padding has no channels, and who is fresh none that are old.
    place = (head * VALUES + v)[:, None] * KEYS + k[None, :]
    at = state_ptr + slot * slot_stride + place
    real = (v < VALUES)[:, None] & (k[None, :] < KEYS)
    depend(EARLY)
    if MOST == 1:
        if live:
            now = tl.load(at, mask=real & (k[None, :] < tl.where(old, KEYS, 0)), other=0.0)
            now = _token(
                now.to(tl.float32), qkv_ptr, a_ptr, b_ptr, out_ptr, a_log, dt_bias, start, head,
                qkv_stride, a_stride, b_stride, k, v, GROUP, HEADS, KEYS, VALUES,
            )  # fmt: skip
            tl.store(at, now.to(state_ptr.dtype.element_ty), mask=real)
        else:
            zeros = tl.zeros([BLOCK_V], dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + (row * HEADS + head) * VALUES + v, zeros, mask=v < VALUES)
    elif live & (count > 0) & (count <= MOST):
        now = tl.load(at, mask=real & (k[None, :] < tl.where(old, KEYS, 0)), other=0.0)
        now = now.to(tl.float32)
        for token in range(count):
            now = _token(
                now, qkv_ptr, a_ptr, b_ptr, out_ptr, a_log, dt_bias, start + token, head,
                qkv_stride, a_stride, b_stride, k, v, GROUP, HEADS, KEYS, VALUES,
            )  # fmt: skip
        tl.store(at, now.to(state_ptr.dtype.element_ty), mask=real)

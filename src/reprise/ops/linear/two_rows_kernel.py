# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of two rows with a small weight in Triton, with the norm before and the activation or
sum behind them.

As those of one row in :mod:`reprise.ops.linear.triton`: plain arithmetic, no program needs
another's result. With a small weight that chain is shorter than one through the matrix units, whose
programs share tiles; plain arithmetic becomes the limit at three rows, and with a large weight at
two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import (
    cdiv,
    depend,
    launch,
    launch_options,
    next_power_of_2,
    silu,
    with_gain,
)

_FEATURES = 4
"""Rows of the weight that a program takes."""
_ELEMENTS = 64
"""Elements of the weight that a thread holds."""
_SIDE_BY_SIDE = 8
"""Elements of a row that a thread reads at once, and sums first."""
_MOST_INPUTS = 4096
"""A program has whole rows in its registers."""
_MOST_WEIGHTS = 1 << 23
"""Elements of a weight beyond which the matrix units are faster."""


def supports_two_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`launch_two_rows` computes this product, and faster than others."""
    return (
        x.shape[0] == 2
        and x.element_size() == 2
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.numel() <= _MOST_WEIGHTS
        and x.shape[1] % _SIDE_BY_SIDE == 0
        and x.shape[1] <= _MOST_INPUTS
    )


def launch_two_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    gated: bool = False,
    add: bool = False,
) -> None:
    """Write ``x @ weight.T + bias`` to ``out``, or add it if ``add``.

    Args:
        x: [2, K], see :func:`supports_two_rows`.
        weight: [N, K].
        bias: [N], or None.
        out: [2, N].
        norm_weight: [K], of the norm that ``x`` goes through first, or None.
        eps: Of the norm.
        gated: ``weight`` has 2*N rows and ``bias`` as many elements, gates first; write
            ``silu(gate) * up``.
        add: Keep what ``out`` holds and add to it.
    """
    inputs, features = x.shape[1], out.shape[1]
    block_k = max(64, next_power_of_2(inputs))
    block_n = _FEATURES // 2 if gated else _FEATURES
    launch(two_rows_kernel, (cdiv(features, block_n),))(
        x,
        norm_weight,
        weight,
        bias,
        out,
        features,
        x.stride(0),
        out.stride(0),
        eps,
        INPUTS=inputs,
        GATED=gated,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SIDE_BY_SIDE=_SIDE_BY_SIDE,
        num_warps=max(1, _FEATURES * block_k // (32 * _ELEMENTS)),
        **launch_options(),
    )


@triton.jit
def _tile(weight_ptr, n, k, features, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a weight, zeros outside of it. Read once, so not worth caching."""
    inside = (n < features)[:, None]
    if INPUTS != BLOCK_K:
        inside = inside & (k < INPUTS)[None, :]
    offset = n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    return tl.load(weight_ptr + offset, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _some(products, SIDE_BY_SIDE: tl.constexpr):
    """[N, K] to [N, K / SIDE_BY_SIDE]: what a thread sums by itself."""
    ROWS: tl.constexpr = products.shape[0]
    PARTS: tl.constexpr = products.shape[1] // SIDE_BY_SIDE
    return tl.sum(tl.reshape(products, [ROWS, PARTS, SIDE_BY_SIDE]), axis=2)


@triton.jit
def _both(weight, x_0, x_1, SIDE_BY_SIDE: tl.constexpr):
    """[N, K] times two of [K]: [N, 2]. Threads exchange the sums of both at once."""
    weight = weight.to(tl.float32)
    sum_0 = _some(weight * x_0[None, :], SIDE_BY_SIDE)
    return tl.sum(tl.join(sum_0, _some(weight * x_1[None, :], SIDE_BY_SIDE)), axis=1)


@triton.jit
def two_rows_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    features,
    x_stride,
    out_stride,
    eps,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of ``features`` outputs of both rows.

    x: [2, INPUTS], normalised first if there is a norm. weight: [features, INPUTS], or twice as
    many rows if GATED: gates, then what they let through. ADD: to what out holds.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight = _tile(weight_ptr, n, k, features, INPUTS, BLOCK_K)
    up = weight
    if GATED:
        up_ptr = weight_ptr + tl.cast(features, tl.int64) * INPUTS
        up = _tile(up_ptr, n, k, features, INPUTS, BLOCK_K)
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + k, mask=k < INPUTS, other=0.0)
    depend(EARLY)

    kind: tl.constexpr = out_ptr.dtype.element_ty
    x_0 = tl.load(x_ptr + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    x_1 = tl.load(x_ptr + x_stride + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        squares_0 = _some((x_0 * x_0)[None, :], SIDE_BY_SIDE)
        squares = tl.join(squares_0, _some((x_1 * x_1)[None, :], SIDE_BY_SIDE))
        scale_0, scale_1 = tl.split(tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps))
        # Rounded where the reference rounds.
        x_0 = with_gain(x_0 * tl.sum(scale_0, axis=0), gain, kind).to(kind).to(tl.float32)
        x_1 = with_gain(x_1 * tl.sum(scale_1, axis=0), gain, kind).to(kind).to(tl.float32)
    acc = _both(weight, x_0, x_1, SIDE_BY_SIDE)
    real = (n < features)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < features, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc_up = _both(up, x_0, x_1, SIDE_BY_SIDE)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + features + n, mask=n < features, other=0.0)
            acc_up += bias.to(tl.float32)[:, None]
        acc = silu(acc.to(kind).to(tl.float32), kind) * acc_up.to(kind).to(tl.float32)
    target = out_ptr + tl.arange(0, 2).to(tl.int64)[None, :] * out_stride + n[:, None]
    if ADD:
        acc += tl.load(target, mask=real, other=0.0).to(tl.float32)
    tl.store(target, acc.to(kind), mask=real)

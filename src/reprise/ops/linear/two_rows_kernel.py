# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of two rows with a small weight in Triton, with the sum behind them.

As those of one row in :mod:`reprise.ops.linear.triton`: plain arithmetic, no program needs
another's result. With a small weight that chain is shorter than one through the matrix units, whose
programs share tiles; plain arithmetic becomes the limit at three rows, and with a large weight at
two, or with the norm before it.
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
)

_FEATURES = 4
"""Rows of the weight that a program takes."""
_ELEMENTS = 64
"""Elements of the weight that a thread holds; half as many where rows are long."""
_LONG = 2048
_SIDE_BY_SIDE = 16
"""Elements of a row that are summed first, before both rows' sums are exchanged at once."""
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
    *,
    add: bool = False,
) -> None:
    """Write ``x @ weight.T + bias`` to ``out``, or add it if ``add``.

    Args:
        x: [2, K], see :func:`supports_two_rows`.
        weight: [N, K].
        bias: [N], or None.
        out: [2, N].
        add: Keep what ``out`` holds and add to it.
    """
    inputs, features = x.shape[1], out.shape[1]
    block_k = max(64, next_power_of_2(inputs))
    elements = _ELEMENTS if block_k <= _LONG else _ELEMENTS // 2
    launch(two_rows_kernel, (cdiv(features, _FEATURES),))(
        x,
        weight,
        bias,
        out,
        features,
        x.stride(0),
        out.stride(0),
        INPUTS=inputs,
        ADD=add,
        BLOCK_N=_FEATURES,
        BLOCK_K=block_k,
        SIDE_BY_SIDE=_SIDE_BY_SIDE,
        num_warps=max(1, _FEATURES * block_k // (32 * elements)),
        **launch_options(),
    )


@triton.jit
def _some(products, SIDE_BY_SIDE: tl.constexpr):
    """[N, K] to [N, K / SIDE_BY_SIDE]: what a thread sums by itself."""
    ROWS: tl.constexpr = products.shape[0]
    PARTS: tl.constexpr = products.shape[1] // SIDE_BY_SIDE
    return tl.sum(tl.reshape(products, [ROWS, PARTS, SIDE_BY_SIDE]), axis=2)


@triton.jit
def two_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    features,
    x_stride,
    out_stride,
    INPUTS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of ``features`` outputs of both rows.

    x: [2, INPUTS]; weight: [features, INPUTS]. ADD: to what out holds.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = (n < features)[:, None]
    inside = real
    if INPUTS != BLOCK_K:
        inside = inside & (k < INPUTS)[None, :]
    offset = n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    # Read once, so not worth caching.
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0, eviction_policy="evict_first")
    depend(EARLY)

    x_0 = tl.load(x_ptr + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    x_1 = tl.load(x_ptr + x_stride + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    wide = weight.to(tl.float32)
    sum_0 = _some(wide * x_0[None, :], SIDE_BY_SIDE)
    # Threads exchange the sums of both rows at once.
    acc = tl.sum(tl.join(sum_0, _some(wide * x_1[None, :], SIDE_BY_SIDE)), axis=1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < features, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + tl.arange(0, 2).to(tl.int64)[None, :] * out_stride + n[:, None]
    if ADD:
        acc += tl.load(target, mask=real, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=real)

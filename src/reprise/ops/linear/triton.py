"""Products of one row in Triton, with the norm before and the activation or sum behind them.

One row is bound by the bandwidth at which weights arrive. A program takes a few rows of the weight,
reads each element once in wide loads and multiplies in plain float32 arithmetic; no program needs
another's result, so there is no second pass. The norm of ``x`` is computed again by each program:
that is cheaper than a launch. Where a kernel may start before its predecessor has ended, the first
weights are on their way by the time ``x`` is there.

Two rows with a small weight are for :mod:`two_rows_kernel`, few rows more for
:mod:`few_rows_kernel`, many with a small weight for :mod:`small_weight_kernel`; all else, and
float32, goes to the device's BLAS.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.linear.few_rows_kernel import launch_few_rows, supports_few_rows, takes_norm
from reprise.ops.linear.small_weight_kernel import launch_small_weight, supports_small_weight
from reprise.ops.linear.two_rows_kernel import launch_two_rows, supports_two_rows
from reprise.ops.rms_norm.triton import rms_norm
from reprise.ops.silu_and_mul.triton import silu_and_mul
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
_MOST_WEIGHTS = 1 << 27
"""Elements of a weight from which the BLAS reaches the bandwidth too: the head's."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the reference."""
    return _product(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the reference."""
    launch_product = _kernel_of(x, weight, gated=True)
    if launch_product is None:
        return silu_and_mul(F.linear(x, weight, bias))
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    launch_product(x, weight, bias, out, gated=True)
    return out


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Shapes as in the reference."""
    launch_product = _kernel_with_norm(x, weight)
    if launch_product is None:
        return _product(rms_norm(x, norm_weight, eps), weight, bias)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    launch_product(x, weight, bias, out, norm_weight, eps)
    return out


def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Shapes as in the reference."""
    size = weight.shape[0] // 2
    launch_product = _kernel_with_norm(x, weight)
    if launch_product is not None:
        out = x.new_empty((x.shape[0], size))
        launch_product(x, weight, bias, out, norm_weight, eps, gated=True)
        return out
    normed = rms_norm(x, norm_weight, eps)
    launch_product = _kernel_of(normed, weight, gated=True)
    if launch_product is not None:
        out = x.new_empty((x.shape[0], size))
        launch_product(normed, weight, bias, out, gated=True)
        return out
    product = F.linear(normed, weight, bias)
    del normed  # here a step has its peak of memory
    return silu_and_mul(product)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """Shapes as in the reference."""
    launch_product = _kernel_of(x, weight)
    if launch_product is not None:
        launch_product(x, weight, bias, residual, add=True)
        return
    if bias is not None:
        residual.add_(bias)
    torch.addmm(residual, x, weight.t(), out=residual)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    launch_product = _kernel_of(x, weight)
    if launch_product is None:
        return F.linear(x, weight, bias)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    launch_product(x, weight, bias, out)
    return out


def _kernel_of(x: Tensor, weight: Tensor, gated: bool = False) -> Callable[..., None] | None:
    """What launches a product; None: the BLAS is faster."""
    if _one_row(x, weight):
        return _launch
    if not gated and supports_two_rows(x, weight):
        return launch_two_rows
    if supports_few_rows(x, weight):
        return launch_few_rows
    if x.shape[0] > 1 and supports_small_weight(x, weight, gated):
        return launch_small_weight
    return None


def _kernel_with_norm(x: Tensor, weight: Tensor) -> Callable[..., None] | None:
    """What launches a product with the norm before it; None: the norm has a launch of its own."""
    if _one_row(x, weight):
        return _launch
    return launch_few_rows if takes_norm(x, weight) else None


def _one_row(x: Tensor, weight: Tensor) -> bool:
    return (
        x.shape[0] == 1
        and x.dtype is not torch.float32
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.numel() < _MOST_WEIGHTS
    )


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, norm_weight: Tensor | None = None,
    eps: float = 0.0, *, gated: bool = False, add: bool = False,
) -> None:  # fmt: skip
    inputs, features = x.shape[1], out.shape[1]
    block_k = next_power_of_2(inputs)
    if block_k > 4096:
        block_k = 1024
    block_n = _FEATURES // 2 if gated else _FEATURES
    launch(one_row_kernel, (cdiv(features, block_n),))(
        x,
        norm_weight,
        weight,
        bias,
        out,
        features,
        eps,
        INPUTS=inputs,
        GATED=gated,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=max(1, _FEATURES * block_k // (32 * _ELEMENTS)),
        **launch_options(),
    )


@triton.jit
def _tile(weight_ptr, n, k, features, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a weight, zeros outside of it. Read once, so not worth caching."""
    offset = n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    inside = (n < features)[:, None]
    if INPUTS % BLOCK_K != 0:
        inside = inside & (k < INPUTS)[None, :]
    return tl.load(weight_ptr + offset, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def one_row_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    features,
    eps,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of ``features`` outputs.

    x: [INPUTS], normalised first if there is a norm. weight: [features, INPUTS], or twice as many
    rows if GATED: gates, then what they let through. ADD: to what out holds.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = n < features
    weight = _tile(weight_ptr, n, k, features, INPUTS, BLOCK_K)
    up_ptr = weight_ptr + tl.cast(features, tl.int64) * INPUTS
    up = weight
    if GATED:
        up = _tile(up_ptr, n, k, features, INPUTS, BLOCK_K)
    # What behind the wait would be waited for once more is asked for here, or with the inputs.
    if norm_ptr is not None and INPUTS == BLOCK_K:
        gain = tl.load(norm_ptr + k)
    depend(EARLY)
    if ADD:
        there = tl.load(out_ptr + n, mask=real, other=0.0)

    scale = 1.0
    if norm_ptr is not None:
        squares = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)

    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    acc_up = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        wide = weight.to(tl.float32)
        wide_up = up.to(tl.float32)
        if start + BLOCK_K < INPUTS:  # the next tile is asked for before this one is used
            weight = _tile(weight_ptr, n, start + BLOCK_K + k, features, INPUTS, BLOCK_K)
            if GATED:
                up = _tile(up_ptr, n, start + BLOCK_K + k, features, INPUTS, BLOCK_K)
        x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0)
        value = x.to(tl.float32)
        if norm_ptr is not None:
            if INPUTS != BLOCK_K:
                gain = tl.load(norm_ptr + start + k, mask=start + k < INPUTS, other=0.0)
            # Rounded where the reference rounds.
            value = with_gain(value * scale, gain, x.dtype).to(x.dtype).to(tl.float32)
        acc += tl.sum(wide * value[None, :], axis=1)
        if GATED:
            acc_up += tl.sum(wide_up * value[None, :], axis=1)

    kind = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=real, other=0.0).to(tl.float32)
    if GATED:
        if bias_ptr is not None:
            acc_up += tl.load(bias_ptr + features + n, mask=real, other=0.0).to(tl.float32)
        gate = acc.to(kind).to(tl.float32)
        acc = silu(gate, kind) * acc_up.to(kind).to(tl.float32)
    if ADD:
        acc += there.to(tl.float32)
    tl.store(out_ptr + n, acc.to(kind), mask=real)

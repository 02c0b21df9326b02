# mypy: allow-untyped-defs, no-check-untyped-defs
"""Experts of a row or two in plain arithmetic: each row reads the weights of its own experts.

Rows so few rarely share an expert, and a sum that no matrix unit needs to be fed for reaches the
bandwidth without sorting, tiles and a launch for the sum over experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options, next_power_of_2, silu

UP_FEATURES, DOWN_FEATURES = 1, 1
"""Rows of a weight (of gates, and as many of what they let through) that a program takes."""
_ELEMENTS = 64
"""Elements of a weight that a thread holds."""


def launch_one_row(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor,
    *,
    add: bool,
) -> None:
    """Write the weighted sums to ``out`` [T, D], or add them to what it holds if ``add``."""
    rows, top = ids.shape
    experts, hidden, inner = down.shape
    products = x.new_empty((rows * top, inner))
    block = _block(hidden)
    launch(gate_up_kernel, (cdiv(inner, UP_FEATURES), rows * top))(
        x,
        ids,
        gate_up,
        products,
        x.stride(0),
        inner,
        EXPERTS=experts,
        TOP=top,
        INPUTS=hidden,
        BLOCK_N=UP_FEATURES,
        BLOCK_K=block,
        num_warps=max(1, 2 * UP_FEATURES * block // (32 * _ELEMENTS)),
        **launch_options(),
    )
    block = _block(inner)
    launch(down_kernel, (cdiv(hidden, DOWN_FEATURES), rows))(
        products,
        weights,
        ids,
        down,
        out,
        out.stride(0),
        hidden,
        EXPERTS=experts,
        TOP=top,
        INPUTS=inner,
        ADD=add,
        BLOCK_N=DOWN_FEATURES,
        BLOCK_K=block,
        num_warps=max(1, DOWN_FEATURES * block // (16 * _ELEMENTS)),
        **launch_options(),
    )


def _block(inputs: int) -> int:
    block = next_power_of_2(inputs)
    return block if block <= 4096 else 1024


@triton.jit
def _tile(weight_ptr, n, k, features, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a weight, zeros outside of it. Read once, so not worth caching."""
    inside = (n < features)[:, None]
    if INPUTS % BLOCK_K != 0:
        inside = inside & (k < INPUTS)[None, :]
    offset = n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    return tl.load(weight_ptr + offset, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def gate_up_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    features,
    EXPERTS: tl.constexpr,
    TOP: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of a slot's ``features`` products of gate and up."""
    slot = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    depend(EARLY)
    expert = tl.load(ids_ptr + slot)
    if (expert >= 0) & (expert < EXPERTS):
        weight_ptr += expert.to(tl.int64) * (2 * features) * INPUTS
        up_ptr = weight_ptr + tl.cast(features, tl.int64) * INPUTS
        x_ptr += (slot // TOP).to(tl.int64) * x_stride
        gates = tl.zeros([BLOCK_N], dtype=tl.float32)
        ups = tl.zeros([BLOCK_N], dtype=tl.float32)
        gate = _tile(weight_ptr, n, k, features, INPUTS, BLOCK_K)
        up = _tile(up_ptr, n, k, features, INPUTS, BLOCK_K)
        for start in range(0, INPUTS, BLOCK_K):
            wide = gate.to(tl.float32)
            wide_up = up.to(tl.float32)
            if start + BLOCK_K < INPUTS:  # the next tile is asked for before this one is used
                gate = _tile(weight_ptr, n, start + BLOCK_K + k, features, INPUTS, BLOCK_K)
                up = _tile(up_ptr, n, start + BLOCK_K + k, features, INPUTS, BLOCK_K)
            x = tl.load(x_ptr + start + k, mask=start + k < INPUTS, other=0.0).to(tl.float32)
            gates += tl.sum(wide * x[None, :], axis=1)
            ups += tl.sum(wide_up * x[None, :], axis=1)
        kind = out_ptr.dtype.element_ty
        gates = silu(gates.to(kind).to(tl.float32), kind) * ups.to(kind).to(tl.float32)
        tl.store(out_ptr + slot * features + n, gates.to(kind), mask=n < features)


@triton.jit
def down_kernel(
    x_ptr,
    weights_ptr,
    ids_ptr,
    weight_ptr,
    out_ptr,
    out_stride,
    features,
    EXPERTS: tl.constexpr,
    TOP: tl.constexpr,
    INPUTS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK_N of the ``features`` of a row, expert after expert."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    depend(EARLY)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for each in tl.static_range(TOP):
        slot = row * TOP + each
        expert = tl.load(ids_ptr + slot)
        if (expert >= 0) & (expert < EXPERTS):
            here = weight_ptr + expert.to(tl.int64) * features * INPUTS
            acc = tl.zeros([BLOCK_N], dtype=tl.float32)
            for start in range(0, INPUTS, BLOCK_K):
                weight = _tile(here, n, start + k, features, INPUTS, BLOCK_K).to(tl.float32)
                x = tl.load(x_ptr + slot * INPUTS + start + k, mask=start + k < INPUTS, other=0.0)
                acc += tl.sum(weight * x.to(tl.float32)[None, :], axis=1)
            kind = out_ptr.dtype.element_ty
            total += acc.to(kind).to(tl.float32) * tl.load(weights_ptr + slot)
    target = out_ptr + row.to(tl.int64) * out_stride + n
    if ADD:
        kind = out_ptr.dtype.element_ty
        total = total.to(kind).to(tl.float32) + tl.load(target, mask=n < features, other=0.0).to(
            tl.float32
        )
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=n < features)

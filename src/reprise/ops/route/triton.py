# mypy: allow-untyped-defs, no-check-untyped-defs
"""Routing in Triton: one program a row, the choice in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.route.reference import SCORINGS, TINY
from reprise.ops.triton_util import depend, launch, launch_options, next_power_of_2, warps

_SCORINGS = {name: number for number, name in enumerate(SCORINGS)}


def route(
    logits: Tensor,
    live: Tensor,
    weights: Tensor,
    ids: Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
    bias: Tensor | None,
    chosen: Tensor | None,
) -> None:
    """Shapes as in the reference."""
    if scoring not in _SCORINGS:
        raise ValueError(f"scoring={scoring!r} must be one of {', '.join(SCORINGS)}")
    rows, top = ids.shape
    block = next_power_of_2(logits.shape[1])
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    launch(route_kernel, (rows,))(
        logits,
        live,
        bias,
        chosen,
        weights,
        ids,
        logits.stride(0),
        scale,
        EXPERTS=logits.shape[1],
        TOP=top,
        SCORING=_SCORINGS[scoring],
        RENORMALIZE=renormalize,
        TINY_SUM=TINY,
        BLOCK=block,
        BLOCK_TOP=next_power_of_2(top),
        num_warps=warps(block, 4),
        **launch_options(),
    )


@triton.jit
def _key(x):
    """int32 in the order of float32: NaN as the largest, both zeros the same."""
    x = tl.where(x != x, float("inf"), tl.where(x == 0, 0.0, x))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def route_kernel(
    logits_ptr,
    live_ptr,
    bias_ptr,
    chosen_ptr,
    weights_ptr,
    ids_ptr,
    row_stride,
    scale,
    EXPERTS: tl.constexpr,
    TOP: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TINY_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program routes a row. SCORING: 0 softmax, 1 sigmoid, 2 root of softplus."""
    row = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    place = tl.arange(0, BLOCK_TOP)
    real = expert < EXPERTS
    depend(EARLY)

    x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + expert, mask=real, other=0.0)
    x = x.to(tl.float32)
    if SCORING == 0:
        high = tl.max(tl.where(real, x, float("-inf")), axis=0)
        scores = tl.where(real, tl.exp(x - high), 0.0)
        scores = scores / tl.sum(scores, axis=0)
    elif SCORING == 1:
        scores = 1 / (1 + tl.exp(-x))
    else:
        scores = tl.sqrt(tl.log(1 + tl.exp(-tl.abs(x))) + tl.maximum(x, 0.0))
        # Where the sum is all but 1 its logarithm is what was added.
        scores = tl.where(x < -10, tl.sqrt(tl.exp(x)), scores)
    found = tl.zeros([BLOCK_TOP], dtype=tl.float32)
    numbers = tl.zeros([BLOCK_TOP], dtype=tl.int32)
    if chosen_ptr is not None:
        numbers = tl.load(chosen_ptr + row * TOP + place, mask=place < TOP, other=0).to(tl.int32)
    keys = x
    if bias_ptr is not None:
        keys = scores + tl.load(bias_ptr + expert, mask=real, other=0.0)
    # Below the key of every number, -inf too.
    keys = tl.where(real, _key(keys), -0x7FFFFFFF - 1)
    for each in tl.static_range(TOP):
        if chosen_ptr is not None:
            best = tl.sum(tl.where(place == each, numbers, 0), axis=0)
        else:
            high_key = tl.max(keys, axis=0)
            best = tl.min(tl.where((keys == high_key) & real, expert, EXPERTS), axis=0)
            keys = tl.where(expert == best, -0x7FFFFFFF - 1, keys)
            numbers = tl.where(place == each, best, numbers)
        found = tl.where(
            place == each, tl.sum(tl.where(expert == best, scores, 0.0), axis=0), found
        )
    if RENORMALIZE:
        found = found / (tl.sum(found, axis=0) + TINY_SUM)
    padding = row >= tl.load(live_ptr)
    target = row * TOP + place
    tl.store(weights_ptr + target, tl.where(padding, 0.0, found * scale), mask=place < TOP)
    tl.store(ids_ptr + target, tl.where(padding, -1, numbers), mask=place < TOP)

# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of two factors of eight bits in Triton, with the activation or sum behind them.

As in :mod:`reprise.ops.linear.few_rows_kernel` the weight is the matrix units' first operand, it is
read before the kernel before has ended, and programs that share a tile sum in one order. Where the
device does not multiply numbers of eight bits, both are multiplied in the compute dtype, which
holds them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.fp8_linear.accepts import STEP
from reprise.ops.linear.tile_end import finish, summed
from reprise.ops.triton_util import (
    APART,
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    ended,
    fetch,
    launch,
    launch_options,
    let_next_start,
    limits,
    shares,
)


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    rows: int
    """Of ``x`` in a tile."""
    block_n: int
    """Rows of the weight in a tile; with an activation one half are gates."""
    together: int
    """Steps of the inner loop that are loaded at a time."""
    num_stages: int
    num_warps: int
    programs: float
    """To aim at, on a multiprocessor."""
    late: bool
    """``x`` is read when it is needed."""
    fetched: int = 512
    """Inputs of each row of the weight that are fetched early where ``x`` is not read late."""
    splits: int = 1
    """Programs that share a tile."""
    apart: bool = False
    """Products and sums are not made into one."""


_CONFIGS = (
    Config(16, 64, 4, 2, 4, 3, late=True),
    Config(32, 64, 1, 6, 4, 2, late=False, fetched=1024),
    Config(64, 64, 1, 6, 4, 2, late=False),
    Config(128, 128, 1, 3, 8, 0, late=False),
)
_MANY_TILES = Config(64, 64, 1, 4, 4, 3, late=False)
"""In place of the third, where its tiles are more than two for each multiprocessor: all run at
once."""
_LARGE = Config(64, 64, 2, 3, 4, 2, late=False)
"""In place of the third for other weights of more than :data:`_SMALL_WEIGHTS` elements, where both
programs and all their stages fit. Where they do not, registers do not suffice either."""
_LARGE_WEIGHTS = 1 << 24
_FEW_TILES = Config(8, 64, 4, 2, 4, 4, late=True)
"""In place of the first for one row (of several no device has run it) and weights between
:data:`_SMALL_WEIGHTS` and :data:`_LARGE_WEIGHTS`: of 4,096 inputs a share is one step, so all of
the weight is on its way before ``x`` is there."""
_SMALL_WEIGHTS = 1 << 23


@functools.cache
def _config_of(rows: int, outputs: int, inputs: int, device: torch.device, wide: bool) -> Config:
    """``wide``: the factors are multiplied in two bytes."""
    config = next((each for each in _CONFIGS if rows <= each.rows), _CONFIGS[-1])
    if config is _CONFIGS[0]:
        if rows == 1 and _SMALL_WEIGHTS < outputs * inputs <= _LARGE_WEIGHTS:
            config = _FEW_TILES
    elif config is _CONFIGS[2]:
        if cdiv(outputs, _MANY_TILES.block_n) > 2 * limits(device).multiprocessors:
            config = _MANY_TILES
        elif outputs * inputs > _SMALL_WEIGHTS and not wide:
            needed = _LARGE.programs * _LARGE.num_stages * _stage(_LARGE, wide)
            if needed <= limits(device).shared_memory:
                config = _LARGE
    return fitted(config, outputs, inputs, device, wide)


def fitted(
    config: Config, outputs: int, inputs: int, device: torch.device, wide: bool = False
) -> Config:
    """``config`` for a product on a device."""
    config = replace(config, together=math.gcd(inputs // STEP, config.together))
    tiles, steps = cdiv(outputs, config.block_n), inputs // STEP // config.together
    splits = shares(tiles, steps, config.programs, device)
    stages = limits(device).shared_memory // _stage(config, wide)
    stages = max(1, min(config.num_stages, stages))
    return replace(config, num_stages=stages, splits=splits)


def _stage(config: Config, wide: bool) -> int:
    """Bytes of both factors of a step."""
    return (config.block_n + config.rows * (1 + wide)) * STEP * config.together


def launch_product(
    numbers: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    block_n: int,
    *,
    add: bool = False,
    gated: bool = False,
    groups: int = 1,
    config: Config | None = None,
) -> None:
    """Write the product to ``out``, or add it if ``add``.

    Args:
        numbers: [T, K] of :func:`quantise`; K a multiple of 128.
        scales: [K / 128 or 1, T], of the same.
        weight: [N, K] float8_e4m3fn.
        weight_scale: [ceil(N / block_n), K / 128 or 1] float32.
        bias: [N], or None.
        out: [T, N], in the compute dtype.
        block_n: Rows of the weight that share a scale.
        add: Keep what ``out`` holds and add to it.
        gated: ``weight`` has 2*N rows, gates first; write ``silu(gate) * up``.
        groups: Products side by side, of as many equal parts of N, each of whole blocks: numbers
            are [G, T, K] then, and scales [G, K / 128 or 1, T].
        config: Sizes; None: those that suit the product.
    """
    rows, inputs = len(out), numbers.shape[-1]
    native = numbers.dtype is weight.dtype
    config = config or _config_of(rows, len(weight), inputs, out.device, not native)
    tiles = groups * cdiv(rows, config.rows) * cdiv(len(weight) // groups, config.block_n)
    partial = scales
    if config.splits > 1:
        size = tiles * config.rows * config.block_n
        partial = out.new_empty((config.splits, size), dtype=torch.float32)
    launch(fp8_product_kernel, (tiles * config.splits,))(
        numbers,
        scales,
        weight if native else weight.view(torch.uint8),
        weight_scale,
        bias,
        out,
        partial,
        arrivals(tiles, out.device),
        rows,
        out.shape[1] // groups,
        out.stride(0),
        INPUTS=inputs,
        GROUPS=groups,
        ROWS_OF_SCALE=block_n,
        WHOLE=scales.shape[-2] == 1,
        ADD=add,
        GATED=gated,
        SPLITS=config.splits,
        WIDEN=INTERPRETED,
        NATIVE=native,
        LATE=config.late,
        FETCHED=config.fetched,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        TOGETHER=config.together,
        STEP=STEP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **(APART if config.apart else {}),
        **launch_options(),
    )


@triton.jit
def from_bits(bits, kind: tl.constexpr):
    """Bytes to the numbers of eight bits (e4m3) that they are, in ``kind``."""
    bits = bits.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # float16 of a 256th
    return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(kind)


@triton.jit
def _multiply(acc, weight, weight_scale, x, x_scale, NATIVE: tl.constexpr, WIDEN: tl.constexpr):
    """acc + (weight @ x) * scales."""
    if not NATIVE:
        weight = from_bits(weight, x.dtype)
        if WIDEN:
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
    # A sum of its own for each step: matrix units add numbers of eight bits with fewer bits than
    # float32 has.
    return acc + tl.dot(weight, x) * (weight_scale[:, None] * x_scale[None, :])


@triton.jit(do_not_specialize=["rows"])
def fp8_product_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    features,
    out_stride,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS_OF_SCALE: tl.constexpr,
    WHOLE: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    LATE: tl.constexpr,
    FETCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into a tile of ``out``.

    x: [rows, INPUTS]; weight: [features, INPUTS], twice as many rows if GATED; out: [rows,
    features]; partial: [SPLITS, tiles, BLOCK_N, ROWS] float32; arrivals: [tiles], how many programs
    are done with a tile. WHOLE: there is one scale for all inputs.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row_tiles = tl.cdiv(rows, ROWS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    place = tile
    SCALES: tl.constexpr = 1 if WHOLE else INPUTS // STEP
    if GROUPS > 1:
        tiles = row_tiles * tl.cdiv(features, WIDTH)
        which = (tile // tiles).to(tl.int64)
        place = tile % tiles
        x_ptr += which * rows * INPUTS
        x_scale_ptr += which * SCALES * rows
        weight_ptr += which * features * INPUTS
        scale_ptr += which * (features // ROWS_OF_SCALE) * SCALES
        out_ptr += which * features
    # Programs next to each other read the same rows of the weight.
    row = place % row_tiles * ROWS + tl.arange(0, ROWS)
    feature = place // row_tiles * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    SHARE: tl.constexpr = INPUTS // SPLITS
    k = split * SHARE + tl.arange(0, STEP)
    real_row = (row < rows)[None, :]
    real_feature = (feature < features)[:, None]
    # Reads of scales need no mask: whoever is not there has another's.
    some_row = tl.minimum(row, rows - 1)
    some_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1)
    x_ptr += row.to(tl.int64)[None, :] * INPUTS + k[:, None]
    first_group = 0 if WHOLE else split * (SHARE // STEP)
    x_scale_ptr += some_row + first_group * rows
    scale_ptr += some_n // ROWS_OF_SCALE * SCALES + first_group
    first_ptr = weight_ptr + some_n.to(tl.int64)[:, None] * INPUTS + split * SHARE
    weight_ptr += n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    if LATE:
        let_next_start(EARLY)
    else:
        fetch(first_ptr + (tl.arange(0, FETCHED // 128) * 128 % SHARE)[None, :], EARLY)
        depend(EARLY)

    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, STEP * TOGETHER):
        group = 0 if WHOLE else start // STEP
        AHEAD: tl.constexpr = 0 if WHOLE else 1
        x_group_ptr = x_scale_ptr + group * rows
        x_scale_0 = tl.zeros([ROWS], dtype=tl.float32)
        x_scale_1, x_scale_2, x_scale_3 = x_scale_0, x_scale_0, x_scale_0
        # Weights are waited for where they are loaded. Scales, not loaded ahead, come before; with
        # more rows registers do not suffice for that.
        FIRST: tl.constexpr = ROWS <= 64
        if FIRST:
            scale_0, scale_1, scale_2, scale_3 = _scales(scale_ptr + group, AHEAD, TOGETHER)
            if not LATE:
                x_scale_0, x_scale_1, x_scale_2, x_scale_3 = _scales(
                    x_group_ptr, AHEAD * rows, TOGETHER
                )
        weight_0 = _weight(weight_ptr + start, real_feature)
        if TOGETHER > 1:
            weight_1 = _weight(weight_ptr + start + STEP, real_feature)
        if TOGETHER > 2:
            weight_2 = _weight(weight_ptr + start + 2 * STEP, real_feature)
            weight_3 = _weight(weight_ptr + start + 3 * STEP, real_feature)
        if not FIRST:
            scale_0, scale_1, scale_2, scale_3 = _scales(scale_ptr + group, AHEAD, TOGETHER)
        x_0 = tl.zeros([STEP, ROWS], dtype=x_ptr.dtype.element_ty)
        x_1, x_2, x_3 = x_0, x_0, x_0
        if LATE:
            # Within the condition, x is loaded when it is needed; weights are, ahead of that.
            if ended(EARLY):
                x_0 = tl.load(x_ptr + start, mask=real_row, other=0.0)
                if TOGETHER > 1:
                    x_1 = tl.load(x_ptr + start + STEP, mask=real_row, other=0.0)
                if TOGETHER > 2:
                    x_2 = tl.load(x_ptr + start + 2 * STEP, mask=real_row, other=0.0)
                    x_3 = tl.load(x_ptr + start + 3 * STEP, mask=real_row, other=0.0)
                x_scale_0, x_scale_1, x_scale_2, x_scale_3 = _scales(
                    x_group_ptr, AHEAD * rows, TOGETHER
                )
        else:
            x_0 = tl.load(x_ptr + start, mask=real_row, other=0.0)
            if TOGETHER > 1:
                x_1 = tl.load(x_ptr + start + STEP, mask=real_row, other=0.0)
            if not FIRST:
                x_scale_0, x_scale_1, x_scale_2, x_scale_3 = _scales(
                    x_group_ptr, AHEAD * rows, TOGETHER
                )
        acc = _multiply(acc, weight_0, scale_0, x_0, x_scale_0, NATIVE, WIDEN)
        if TOGETHER > 1:
            acc = _multiply(acc, weight_1, scale_1, x_1, x_scale_1, NATIVE, WIDEN)
        if TOGETHER > 2:
            acc = _multiply(acc, weight_2, scale_2, x_2, x_scale_2, NATIVE, WIDEN)
            acc = _multiply(acc, weight_3, scale_3, x_3, x_scale_3, NATIVE, WIDEN)
    acc, last = summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        first = place // row_tiles * WIDTH
        finish(acc, bias_ptr, out_ptr, first, features, row, rows, out_stride, GATED, ADD)


@triton.jit
def _weight(ptr, real):
    return tl.load(ptr, mask=real, other=0.0, eviction_policy="evict_first")


@triton.jit
def _scales(ptr, step, COUNT: tl.constexpr):
    """Those of COUNT steps, and others for what is not there of four."""
    scale_0 = tl.load(ptr)
    scale_1, scale_2, scale_3 = scale_0, scale_0, scale_0
    if COUNT > 1:
        scale_1 = tl.load(ptr + step)
    if COUNT > 2:
        scale_2 = tl.load(ptr + 2 * step)
        scale_3 = tl.load(ptr + 3 * step)
    return scale_0, scale_1, scale_2, scale_3

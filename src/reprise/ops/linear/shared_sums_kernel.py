# mypy: allow-untyped-defs, no-check-untyped-defs
"""Matrix products in Triton whose bits of a row depend on that row alone.

The inputs are taken in as many parts as the weight's shape asks for; each part is summed from
zero, input after input, and the parts are added in their order. Whether one program takes all of
them, or several at once of which the last one adds, is decided by the number of rows and changes no
bit: few tiles do not occupy a device.

The weight is the first operand of the matrix units, so tiles of few rows and of many differ in one
thing: in how many columns an instruction has. Each column is a sum of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.linear.tile_end import finish, summed
from reprise.ops.triton_util import (
    APART,
    INTERPRETED,
    arrivals,
    cdiv,
    depend,
    dot,
    ended,
    fetch,
    launch,
    launch_options,
    let_next_start,
    limits,
    takes_ptx,
)


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    rows: int
    """Of ``x`` in a tile."""
    block_n: int
    """Rows of the weight that a tile takes; with an activation one half are gates."""
    block_k: int
    """Inputs of one step of the inner loop."""
    num_stages: int
    """At most: fewer where shared memory holds fewer tiles of both operands."""
    num_warps: int
    late: bool = False
    """``x`` is read when it is needed, behind the first weights: see :mod:`few_rows_kernel`."""
    shared: bool = False
    """Programs share a tile's inputs however many tiles there are."""


_FEW = (
    Config(8, 64, 256, 3, 4, late=True),
    Config(16, 64, 128, 4, 4),
    Config(32, 64, 128, 3, 4),
    Config(64, 64, 64, 4, 4),
)
"""For as many rows: bound by the bandwidth at which weights arrive."""
_DEEP = {8: (256, 5), 32: (128, 6), 64: (128, 5)}
"""Inputs of a step, and stages, of those for so many rows where a program has a multiprocessor to
itself."""
_NARROW = ((128, Config(64, 128, 128, 3, 8)), (256, Config(256, 64, 64, 4, 8)))
"""For up to so many rows, of weights whose tiles then do all run at once."""
_SMALL = (Config(128, 64, 64, 4, 8, shared=True), Config(128, 128, 64, 4, 8))
"""In place of the last of these for up to :data:`_SMALL_WEIGHT` elements: in parts, and as one."""
_SMALL_WEIGHT = 1 << 23
_MANY = Config(128, 128, 64, 3, 8)
_LARGE = Config(256, 128, 64, 4, 8)
_LARGE_GAINS = 1.15
"""How much faster an operation is in these."""
_WIDE = Config(16, 64, 32, 3, 4)
"""For float32, which the matrix units do not take."""
_ONE = Config(64, 128, 64, 4, 4)
"""For any number of rows where tiles of other sizes are multiplied by instructions that take other
numbers of inputs at a time: those of AMD, and the library's products of the interpreter."""
_UNIT = 256
"""Inputs: parts are multiples of it."""
_TILE = 64
"""Rows of the weight in a tile of few rows."""
_FETCHED = 256
"""Inputs of each row of the weight that are fetched early where ``x`` is not read late, of up to
:data:`_FETCHED_ROWS` rows."""
_FETCHED_ROWS = 256
_TOGETHER = 8
"""Tiles of rows that are taken with all tiles of the weight before the next ones are: with all at
once programs that run side by side read more of a long prompt than the last-level cache holds."""


@functools.cache
def parts_of(outputs: int, inputs: int, multiprocessors: int) -> int:
    """Parts of the inputs: as many as let few rows occupy the device."""
    units = cdiv(inputs, _UNIT)
    most = min(units, multiprocessors // cdiv(outputs, _TILE))
    return max((n for n in range(1, most + 1) if units % n == 0), default=1)


@functools.cache
def config_of(
    rows: int, outputs: int, inputs: int, parts: int, multiprocessors: int, dtype: torch.dtype
) -> Config:
    """Sizes for so many rows."""
    if dtype is torch.float32:
        return _WIDE
    few = next((each for each in _FEW if rows <= each.rows), None)
    if few is not None:
        if parts * cdiv(outputs, few.block_n) <= multiprocessors and few.rows in _DEEP:
            block_k, stages = _DEEP[few.rows]
            few = replace(few, block_k=block_k, num_stages=stages)
        return few

    def tiles(config: Config) -> int:
        return cdiv(rows, config.rows) * cdiv(outputs, config.block_n)

    narrow = next((each for most, each in _NARROW if rows <= most), None)
    if narrow is not None and parts * tiles(narrow) <= multiprocessors:
        if narrow is _NARROW[-1][1] and outputs * inputs <= _SMALL_WEIGHT:
            return _SMALL[0 if parts > 1 else 1]
        return narrow

    def rounds(config: Config) -> int:
        return cdiv(tiles(config), multiprocessors) * config.rows

    if parts > 1 and 2 * tiles(_LARGE) <= multiprocessors:
        return _LARGE  # two programs share a tile's inputs
    return _LARGE if rounds(_LARGE) <= _LARGE_GAINS * rounds(_MANY) else _MANY


def launch_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    add: bool = False,
    gated: bool = False,
    made_now: bool = False,
) -> None:
    """Write ``x @ weight.T + bias`` to ``out``, or add it if ``add``.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N], or None.
        out: [T, N], whose columns adjoin.
        add: Keep what ``out`` holds and add to it.
        gated: ``weight`` has 2*N rows and ``bias`` as many elements, gates first; write
            ``silu(gate) * up``.
        made_now: A kernel of this step has written ``weight``, which others need not wait for.
    """
    rows, inputs = x.shape
    if rows == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    if not weight.is_contiguous():
        weight, made_now = weight.contiguous(), True
    outputs, device = weight.shape[0], limits(x.device)
    parts = parts_of(outputs, inputs, device.multiprocessors)
    config = config_of(rows, outputs, inputs, parts, device.multiprocessors, x.dtype)
    if x.dtype is not torch.float32 and not takes_ptx():
        config = _ONE
    tiles = cdiv(rows, config.rows) * cdiv(outputs, config.block_n)
    few = rows <= config.rows or 2 * tiles <= device.multiprocessors
    shared = parts > 1 and (few or config.shared)
    splits = parts if shared else 1
    partial = out
    if parts > 1:
        size = tiles * config.block_n * config.rows
        partial = x.new_empty((parts if shared else parts - 1, size), dtype=torch.float32)
    stage = (config.block_n + config.rows) * config.block_k * x.element_size()
    launch(shared_sums_kernel, (tiles * splits,))(
        x,
        weight,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        rows,
        out.shape[1],
        x.stride(0),
        out.stride(0),
        INPUTS=inputs,
        ADD=add,
        GATED=gated,
        PARTS=parts,
        SHARED=shared,
        UNIT=_UNIT,
        WIDEN=INTERPRETED,
        LATE=config.late,
        FETCHED=_FETCHED if rows <= _FETCHED_ROWS else 0,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        TOGETHER=0 if rows <= config.rows else _TOGETHER,
        num_warps=config.num_warps,
        num_stages=max(1, min(config.num_stages, device.shared_memory // stage)),
        **APART,
        **launch_options(early=not made_now),
    )


@triton.jit
def _sum_of(
    x_ptr, weight_ptr, begin, real_row, real_feature, INPUTS: tl.constexpr, SHARE: tl.constexpr,
    CUT: tl.constexpr, LATE: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The product of SHARE inputs from ``begin``: [BLOCK_N, ROWS] float32.

    x_ptr: [BLOCK_K, ROWS]; weight_ptr: [BLOCK_N, BLOCK_K], both of input 0."""
    k = begin + tl.arange(0, BLOCK_K)
    x_ptr += begin
    weight_ptr += begin
    ONCE: tl.constexpr = "evict_first" if LATE else ""
    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        inside = real_feature
        x_inside = real_row
        if CUT:
            inside = real_feature & (start + k < INPUTS)[None, :]
            x_inside = real_row & (start + k < INPUTS)[:, None]
        weight = tl.load(weight_ptr + start, mask=inside, other=0.0, eviction_policy=ONCE)
        if LATE:
            x = tl.zeros([BLOCK_K, ROWS], dtype=weight.dtype)
            if ended(EARLY):
                x = tl.load(x_ptr + start, mask=x_inside, other=0.0)
        else:
            x = tl.load(x_ptr + start, mask=x_inside, other=0.0)
        acc = dot(weight, x, acc, WIDEN)
    return acc


@triton.jit(do_not_specialize=["rows"])
def shared_sums_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    features,
    x_stride,
    out_stride,
    INPUTS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    UNIT: tl.constexpr,
    WIDEN: tl.constexpr,
    LATE: tl.constexpr,
    FETCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one part of the inputs into a tile of ``out``, or all PARTS.

    x: [rows, INPUTS]; weight: [features, INPUTS], twice as many rows if GATED; out: [rows,
    features]; partial: [PARTS, tiles, BLOCK_N, ROWS] float32, without the last part unless SHARED;
    arrivals: [tiles], how many programs are done with a tile.
    """
    SPLITS: tl.constexpr = PARTS if SHARED else 1
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    first, row = tile * WIDTH, tl.arange(0, ROWS)
    if TOGETHER > 0:
        # Programs next to each other read the same rows of the weight.
        in_group = TOGETHER * tl.cdiv(features, WIDTH)
        first_row = tile // in_group * TOGETHER
        group = tl.minimum(tl.cdiv(rows, ROWS) - first_row, TOGETHER)
        row += (first_row + tile % in_group % group) * ROWS
        first = tile % in_group // group * WIDTH
    feature = first + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    STEP: tl.constexpr = UNIT if PARTS > 1 else BLOCK_K
    COUNT: tl.constexpr = (INPUTS + STEP - 1) // STEP // PARTS
    # A compiler adds the product of a single step to what is to be added behind all of them, and
    # so in another order than behind several: there are two at least.
    SHARE: tl.constexpr = COUNT * STEP if PARTS > 1 or COUNT > 1 else 2 * STEP
    CUT: tl.constexpr = SHARE * PARTS != INPUTS  # there are fewer inputs
    k = tl.arange(0, BLOCK_K)
    real_row = (row < rows)[None, :]
    real_feature = (feature < features)[:, None]
    first_ptr = weight_ptr
    x_ptr += row.to(tl.int64)[None, :] * x_stride + k[:, None]
    weight_ptr += n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    if LATE:
        let_next_start(EARLY)
    else:
        if FETCHED > 0:
            real_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1).to(tl.int64)[:, None]
            line = split * SHARE + tl.arange(0, FETCHED // 64)[None, :] * 64  # of 128 bytes
            fetch(first_ptr + real_n * INPUTS + tl.minimum(line, INPUTS - 1), EARLY)
        depend(EARLY)

    ALONE: tl.constexpr = PARTS - SPLITS
    mine_ptr = partial_ptr
    if ALONE > 0:
        # No registers are left for what waits to be added.
        size = tl.num_programs(0).to(tl.int64) * (BLOCK_N * ROWS)
        mine_ptr += tile.to(tl.int64) * (BLOCK_N * ROWS)
        mine_ptr += tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        for part in range(ALONE):
            its = _sum_of(
                x_ptr, weight_ptr, part * SHARE, real_row, real_feature, INPUTS, SHARE,
                CUT, LATE, WIDEN, ROWS, BLOCK_N, BLOCK_K, EARLY,
            )  # fmt: skip
            tl.store(mine_ptr + part * size, its)
    total = _sum_of(
        x_ptr, weight_ptr, (split + ALONE) * SHARE, real_row, real_feature, INPUTS, SHARE,
        CUT, LATE, WIDEN, ROWS, BLOCK_N, BLOCK_K, EARLY,
    )  # fmt: skip
    if ALONE > 0:
        tl.debug_barrier()
        before = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
        for part in tl.static_range(ALONE):
            before += tl.load(mine_ptr + part * size)
        total = before + total
    total, last = summed(total, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        finish(total, bias_ptr, out_ptr, first, features, row, rows, out_stride, GATED, ADD)

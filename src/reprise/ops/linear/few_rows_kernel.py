# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of few rows in Triton, on the matrix units, in one launch, with the norm before them and
the activation or sum behind them.

Few rows are bound by the bandwidth at which weights arrive, so a tile has many rows of the weight
and as few of ``x`` as the matrix units take: the weight is their first operand. Programs that share
a tile each take a part of its inputs; the last of them to end sums, always in the same order.

A program asks for its first weights before the kernel before it has ended, so the device goes on
reading weights while one kernel ends and the next begins. With 8 rows it waits for that kernel only
where it first reads ``x`` (:func:`reprise.ops.triton_util.ended`) and has several steps of weights
in shared memory by then. With more, ``x`` needs to be asked for ahead like the weights, so these
are on their way to the last-level cache only.
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
    shares,
)


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    rows: int
    """Of ``x`` in a tile."""
    block_k: int
    """Inputs of one step of the inner loop."""
    num_stages: int
    programs: float
    """To aim at, on a multiprocessor."""
    late: bool
    """``x`` is read when it is needed."""
    block_n: int = 64
    """Rows of the weight that a tile takes; with an activation one half are gates. With fewer the
    matrix units of Hopper cannot be used in full."""
    num_warps: int = 4
    fetched: int = 256
    """Inputs of each row of the weight that are fetched early where ``x`` is not read late."""
    splits: int = 1
    """Programs that share a tile."""


_CONFIGS = (
    Config(8, 256, 3, 3, late=True),
    Config(16, 128, 4, 1.5, late=False),
    Config(32, 128, 4, 2, late=False),
    Config(64, 128, 4, 1, late=False),
)
_MANY_TILES = Config(64, 64, 4, 3, late=False, fetched=128)
"""In place of the last, where tiles are more than two for each multiprocessor: all run at once."""
_MORE_TILES = Config(64, 64, 6, 2, late=False, fetched=128)
"""Likewise, where they are more than one for each multiprocessor."""
_MANY_NARROW_TILES = Config(32, 128, 3, 2, late=False)
"""In place of the third where tiles are more than two for each multiprocessor."""
_TWO_ROWS = Config(8, 256, 4, 2, late=True)
"""In place of the first for two rows of up to :data:`_MANY_WEIGHTS` elements."""
_MANY_WEIGHTS = 1 << 23
"""Elements of a weight. With fewer, and more than 8 rows, another kernel is faster."""
_LEAST_PROGRAMS = 0.9
"""On a multiprocessor. With fewer, and more than 8 rows, the BLAS is faster."""


def supports_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`launch_few_rows` computes this product, and faster than others."""
    return (
        x.shape[0] >= 2
        and x.dtype is not torch.float32
        and x.stride(1) == 1
        and weight.is_contiguous()
        and config_of(x.shape[0], *weight.shape, x.device) is not None
    )


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether it is supported with a norm before it. bfloat16 has the range that ``x`` times the
    gain needs: the product is scaled behind the sums."""
    if x.dtype is not torch.bfloat16 or not supports_few_rows(x, weight):
        return False
    config = config_of(x.shape[0], *weight.shape, x.device)
    return config is not None and config.late


@functools.cache
def config_of(rows: int, outputs: int, inputs: int, device: torch.device) -> Config | None:
    """Sizes for a product; None: there are none."""
    config = next((each for each in _CONFIGS if rows <= each.rows), None)
    if config is None or inputs % config.block_k:
        return None
    tiles, places = cdiv(outputs, config.block_n), limits(device).multiprocessors
    if rows == 2 and outputs * inputs <= _MANY_WEIGHTS:
        config = _TWO_ROWS
    elif config is _CONFIGS[-1] and tiles > places:
        config = _MANY_TILES if tiles > 2 * places else _MORE_TILES
    elif config is _CONFIGS[-2] and tiles > 2 * places:
        config = _MANY_NARROW_TILES
    config = fitted(config, outputs, inputs, device)
    many = outputs * inputs > _MANY_WEIGHTS
    programs = cdiv(outputs, config.block_n) * config.splits
    enough = programs >= _LEAST_PROGRAMS * limits(device).multiprocessors
    if not config.late and not (many and enough):
        return None
    return config if config.num_stages else None


def fitted(config: Config, outputs: int, inputs: int, device: torch.device) -> Config:
    """``config`` for a product on a device: with splits, and no more stages than there is memory
    for, which may be none."""
    tiles, steps = cdiv(outputs, config.block_n), inputs // config.block_k
    splits = shares(tiles, steps, config.programs, device)
    stage = (config.block_n + config.rows) * config.block_k * 2
    stages = min(config.num_stages, limits(device).shared_memory // stage)
    return replace(config, num_stages=stages, splits=splits)


def launch_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    add: bool = False,
    gated: bool = False,
    config: Config | None = None,
) -> None:
    """Write ``x @ weight.T + bias`` to ``out``, or add it if ``add``.

    Args:
        x: [T, K], see :func:`supports_few_rows`.
        weight: [N, K].
        bias: [N], or None.
        out: [T, N].
        norm_weight: [K], of the norm that ``x`` goes through first, see :func:`takes_norm`; None:
            there is none.
        eps: Of the norm.
        add: Keep what ``out`` holds and add to it.
        gated: ``weight`` has 2*N rows and ``bias`` as many elements, gates first; write
            ``silu(gate) * up``.
        config: Sizes; None: those of :func:`config_of`.
    """
    config = config or config_of(x.shape[0], *weight.shape, x.device)
    assert config is not None
    tiles = cdiv(x.shape[0], config.rows) * cdiv(weight.shape[0], config.block_n)
    partial = out
    if config.splits > 1:
        size = tiles * config.rows * (config.block_n + 1)
        partial = x.new_empty((config.splits, size), dtype=torch.float32)
    launch(few_rows_kernel, (tiles * config.splits,))(
        x,
        norm_weight,
        weight,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        x.shape[0],
        out.shape[1],
        x.stride(0),
        out.stride(0),
        eps,
        INPUTS=x.shape[1],
        ADD=add,
        GATED=gated,
        SPLITS=config.splits,
        WIDEN=INTERPRETED,
        ROWS=config.rows,
        LATE=config.late,
        FETCHED=config.fetched,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    features,
    x_stride,
    out_stride,
    eps,
    INPUTS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    LATE: tl.constexpr,
    FETCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into a tile of ``out``.

    x: [rows, INPUTS]; weight: [features, INPUTS], twice as many rows if GATED; out: [rows,
    features]; partial: [SPLITS, tiles, BLOCK_N, ROWS] float32, behind it [SPLITS, tiles, ROWS];
    arrivals: [tiles], how many programs are done with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    row_tiles = tl.cdiv(rows, ROWS)
    # Programs next to each other read the same rows of the weight.
    row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    feature = tile // row_tiles * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    SHARE: tl.constexpr = INPUTS // SPLITS
    k = split * SHARE + tl.arange(0, BLOCK_K)
    real_row = (row < rows)[None, :]
    real_feature = (feature < features)[:, None]
    x_ptr += row.to(tl.int64)[None, :] * x_stride + k[:, None]
    first_ptr = weight_ptr
    weight_ptr += n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    kind: tl.constexpr = weight_ptr.dtype.element_ty
    NORM: tl.constexpr = norm_ptr is not None
    if LATE:
        let_next_start(EARLY)
    else:
        real_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1).to(tl.int64)[:, None]
        line = tl.arange(0, FETCHED // 64)[None, :] * 64 % SHARE  # of 128 bytes
        fetch(first_ptr + real_n * INPUTS + split * SHARE + line, EARLY)
        depend(EARLY)

    acc = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K, ROWS], dtype=tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        weight = tl.load(
            weight_ptr + start, mask=real_feature, other=0.0, eviction_policy="evict_first"
        )
        x = tl.zeros([BLOCK_K, ROWS], dtype=kind)
        if LATE:
            if ended(EARLY):
                x = tl.load(x_ptr + start, mask=real_row, other=0.0)
                if NORM:
                    gain = tl.load(norm_ptr + start + k)[:, None].to(tl.float32)
                    squares += x.to(tl.float32) * x.to(tl.float32)
                    x = (x.to(tl.float32) * gain).to(kind)
        else:
            x = tl.load(x_ptr + start, mask=real_row, other=0.0)
        acc = dot(weight, x, acc, WIDEN)
    total = tl.sum(squares, axis=0)
    tiles = tl.num_programs(0) // SPLITS
    squares_ptr = partial_ptr + (SPLITS * BLOCK_N * tiles + tile) * ROWS + tl.arange(0, ROWS)
    if NORM and SPLITS > 1:
        tl.store(squares_ptr + split * tiles * ROWS, total)
    acc, last = summed(acc, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        if NORM:
            if SPLITS > 1:
                total = tl.zeros([ROWS], dtype=tl.float32)
                for other in tl.static_range(SPLITS):
                    total += tl.load(squares_ptr + other * tiles * ROWS, cache_modifier=".cg")
            acc *= tl.rsqrt(total / INPUTS + eps)[None, :]
        first = tile // row_tiles * WIDTH
        finish(acc, bias_ptr, out_ptr, first, features, row, rows, out_stride, GATED, ADD)

# mypy: allow-untyped-defs, no-check-untyped-defs
"""Products of one row of activations with a weight of eight bits in Triton, which quantise the row
themselves, with the norm before and the activation or sum behind them.

As :mod:`reprise.ops.fp8_linear.product_kernel`, but for two things. Each program quantises the
inputs that it multiplies, so that no kernel lies between this one and the one that gives ``x``.
And all groups of a step are one product: the other operand has a column for each group, zeros at
other groups' inputs, so that each group has a sum of its own. A tile of the matrix units has as
many columns whether they are used or not.
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
from reprise.ops.fp8_linear.product_kernel import from_bits
from reprise.ops.fp8_linear.quantise_kernel import eight_bits
from reprise.ops.fp8_linear.reference import LARGEST, LEAST_MAGNITUDE
from reprise.ops.linear.tile_end import finish, summed
from reprise.ops.triton_util import (
    INTERPRETED,
    arrivals,
    cdiv,
    ended,
    launch,
    launch_options,
    let_next_start,
    limits,
    next_power_of_2,
    shares,
    with_gain,
)

_COLUMNS = 16
"""Of a tile of the matrix units, and the most groups of a step."""


@dataclass(frozen=True)
class Config:
    """Sizes of one launch."""

    block_n: int
    """Rows of the weight in a tile; with an activation one half are gates."""
    together: int
    """Groups of a step."""
    num_stages: int
    num_warps: int
    programs: float
    """To aim at, on a multiprocessor."""
    splits: int = 1
    """Programs that share a tile."""


_CONFIG = Config(64, 4, 2, 4, 3)
_FEW_TILES = Config(64, 4, 2, 4, 4)
"""Of weights between :data:`_SMALL_WEIGHTS` and :data:`_LARGE_WEIGHTS`: of 4,096 inputs a share is
one step, so all of the weight is on its way before ``x`` is there."""
_SMALL_WEIGHTS, _LARGE_WEIGHTS = 1 << 23, 1 << 24


@functools.cache
def _config_of(outputs: int, inputs: int, device: torch.device, native: bool) -> Config:
    few = _SMALL_WEIGHTS < outputs * inputs <= _LARGE_WEIGHTS
    config = _FEW_TILES if few else _CONFIG
    if not native:  # registers do not suffice for numbers of two bytes
        config = replace(config, together=2)
    return fitted(config, outputs, inputs, device)


def fitted(config: Config, outputs: int, inputs: int, device: torch.device) -> Config:
    """``config`` for a product on a device."""
    together = math.gcd(inputs // STEP, config.together)
    tiles, steps = cdiv(outputs, config.block_n), inputs // STEP // together
    splits = shares(tiles, steps, config.programs, device)
    stage = config.block_n * STEP * together
    stages = max(1, min(config.num_stages, limits(device).shared_memory // stage))
    return replace(config, together=together, num_stages=stages, splits=splits)


def takes_row(x: Tensor, group: int) -> bool:
    """Whether :func:`launch_row` computes products of ``x`` [T, K] whose scales are of ``group``
    inputs."""
    return len(x) == 1 and group == STEP


def launch_row(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    block_n: int,
    native: bool,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    add: bool = False,
    gated: bool = False,
    config: Config | None = None,
) -> None:
    """Write the product to ``out``, or add it if ``add``.

    Args:
        x: [1, K], its elements side by side; K a multiple of 128.
        weight: [N, K] float8_e4m3fn.
        scale: [ceil(N / block_n), K / 128] float32.
        bias: [N], or None.
        out: [1, N], in the compute dtype.
        block_n: Rows of the weight that share a scale.
        native: The device multiplies numbers of eight bits.
        norm_weight: [K], of the root mean square norm that ``x`` goes through first, or None.
        eps: Of the norm.
        add: Keep what ``out`` holds and add to it.
        gated: ``weight`` has 2*N rows, gates first; write ``silu(gate) * up``.
        config: Sizes; None: those that suit the product.
    """
    outputs, inputs = weight.shape
    config = config or _config_of(outputs, inputs, x.device, native)
    tiles = cdiv(outputs, config.block_n)
    partial = scale
    if config.splits > 1:
        partial = scale.new_empty((config.splits, tiles * config.block_n))
    launch(fp8_row_kernel, (tiles * config.splits,))(
        x,
        norm_weight,
        weight if native else weight.view(torch.uint8),
        scale,
        bias,
        out,
        partial,
        arrivals(tiles, x.device),
        out.shape[1],
        eps,
        INPUTS=inputs,
        ROWS_OF_SCALE=block_n,
        ADD=add,
        GATED=gated,
        SPLITS=config.splits,
        NATIVE=native,
        WIDEN=INTERPRETED,
        EXACT=not INTERPRETED,
        LARGEST=LARGEST,
        LEAST=LEAST_MAGNITUDE,
        WHOLE_ROW=next_power_of_2(inputs),
        BLOCK_N=config.block_n,
        TOGETHER=config.together,
        STEP=STEP,
        COLUMNS=_COLUMNS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


@triton.jit
def _norm(x_ptr, eps, INPUTS: tl.constexpr, WHOLE_ROW: tl.constexpr):
    """What a root mean square norm multiplies a row by."""
    k = tl.arange(0, WHOLE_ROW)
    x = tl.load(x_ptr + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / INPUTS + eps)


@triton.jit
def fp8_row_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    features,
    eps,
    INPUTS: tl.constexpr,
    ROWS_OF_SCALE: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDEN: tl.constexpr,
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program multiplies one share of the inputs into BLOCK_N of ``features`` outputs.

    x: [INPUTS]; weight: [features, INPUTS], twice as many rows if GATED; out: [features]; partial:
    [SPLITS, tiles, BLOCK_N] float32; arrivals: [tiles], how many programs are done with a tile.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    SHARE: tl.constexpr = INPUTS // SPLITS
    BLOCK_K: tl.constexpr = STEP * TOGETHER
    feature = tile * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
    n = feature + tl.arange(0, BLOCK_N) // WIDTH * features
    real_feature = (feature < features)[:, None]
    # Reads of scales need no mask: whoever is not there has another's.
    some_n = tl.minimum(n, features * (BLOCK_N // WIDTH) - 1)
    # Where a step has fewer groups than there are columns, each has several: the first is used.
    SPREAD: tl.constexpr = COLUMNS // TOGETHER
    column = tl.arange(0, COLUMNS)
    scale_ptr += (some_n // ROWS_OF_SCALE)[:, None] * (INPUTS // STEP) + split * (SHARE // STEP)
    scale_ptr += (column // SPREAD)[None, :]
    k = tl.arange(0, BLOCK_K)
    weight_ptr += n.to(tl.int64)[:, None] * INPUTS + split * SHARE + k[None, :]
    which = tl.arange(0, TOGETHER)[:, None] * STEP + tl.arange(0, STEP)[None, :] + split * SHARE
    own = (k // STEP * SPREAD)[None, :] == column[:, None]
    kind: tl.constexpr = weight_ptr.dtype.element_ty if NATIVE else x_ptr.dtype.element_ty
    next_scale = tl.load(scale_ptr)
    gain = 1.0
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + which)
    let_next_start(EARLY)

    norm = 1.0
    x = tl.zeros([TOGETHER, STEP], dtype=x_ptr.dtype.element_ty)
    acc = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        weight = tl.load(
            weight_ptr + start, mask=real_feature, other=0.0, eviction_policy="evict_first"
        )
        following = tl.minimum(start + BLOCK_K, SHARE - BLOCK_K)
        weight_scale = next_scale
        next_scale = tl.load(scale_ptr + following // STEP)
        number = tl.zeros([BLOCK_K], dtype=kind)
        x_scale = tl.zeros([COLUMNS], dtype=tl.float32)
        # Within the condition, x is loaded no earlier than here; weights are, ahead of that.
        if ended(EARLY):
            if start == 0:
                x = tl.load(x_ptr + which)
                if norm_ptr is not None:
                    norm = _norm(x_ptr, eps, INPUTS, WHOLE_ROW)
            value = x.to(tl.float32)
            if norm_ptr is not None:
                # Rounded where the reference rounds.
                value = with_gain(value * norm, gain, x.dtype).to(x.dtype).to(tl.float32)
                gain = tl.load(norm_ptr + following + which)
            x = tl.load(x_ptr + following + which)
            y, scale = eight_bits(value, NATIVE, EXACT, LARGEST, LEAST)
            number = tl.reshape(y.to(kind), [BLOCK_K])
            x_scale = tl.reshape(tl.broadcast_to(scale[:, None], [TOGETHER, SPREAD]), [COLUMNS])
        # Reshaped, a number stays with its thread, which then stores four at a time.
        columns = tl.trans(tl.where(own, tl.reshape(number, [1, BLOCK_K]), 0.0))
        if not NATIVE:
            weight = from_bits(weight, kind)
            if WIDEN:
                weight = weight.to(tl.float32)
                columns = columns.to(tl.float32)
        # A sum of its own for each group: matrix units add numbers of eight bits with fewer bits
        # than float32 has.
        acc += tl.dot(weight, columns) * (weight_scale * x_scale[None, :])
    total = tl.sum(acc, axis=1)[:, None]
    total, last = summed(total, partial_ptr, arrivals_ptr, tile, split, SPLITS)
    if last:
        row = tl.zeros([1], dtype=tl.int32)
        finish(total, bias_ptr, out_ptr, tile * WIDTH, features, row, 1, 0, GATED, ADD)

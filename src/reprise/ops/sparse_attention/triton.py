# mypy: allow-untyped-defs, no-check-untyped-defs
"""Attention over a window and over compressed rows in Triton.

All heads share their rows, so the heads of one token are the rows of a matrix product. What a token
sees is one list: the rows of its window, then compressed ones; it is cut into as many equal parts
as there are programs for a token, by lengths that are read on the device. Where there are several,
a second kernel merges what they found, in their order. Prompts have a program or more for each
token too: the rows that neighbours share come from the last-level cache. Where tokens are few two
programs share a part: each finds all scores and sums half of the channels of the values, so that
less has to be merged, and half as many sums are in its registers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.ops.load_codes import in_pairs
from reprise.ops.request_of import block_of
from reprise.ops.sparse_attention.attend_kernel import sparse_attention_kernel
from reprise.ops.sparse_attention.merge_kernel import sparse_merge_kernel
from reprise.ops.store_latent import row_strides
from reprise.ops.triton_util import (
    INTERPRETED,
    DeviceLimits,
    cdiv,
    launch,
    launch_options,
    limits,
    next_power_of_2,
)

_LOG2_E = 1.4426950408889634
_CHUNK = 32 if INTERPRETED else 512
"""Compressed rows whose places are read at once."""


@dataclass(frozen=True)
class Config:
    """Sizes of a launch."""

    block_m: int
    """Heads of a program."""
    block_n: int
    """Rows at a time."""
    num_warps: int
    num_stages: int
    least: int
    """Rows that a part has at least, unless there are fewer."""
    slices: int = 1
    """Programs that share out the channels of the same rows."""


@functools.cache
def attention_config(
    tokens: int, heads: int, size: int, element_size: int, codes: bool, device: DeviceLimits
) -> Config:
    """``size``: channels of a head; ``codes``: rows become numbers in registers."""
    if INTERPRETED:
        slices = 2 if tokens <= 4 else 1
        return Config(max(16, next_power_of_2(heads)), 16, 1, 1, 16, slices)
    block_d = next_power_of_2(size)
    if element_size == 4:  # products hold their operands in registers
        return Config(16, 16, 8, 1, 64)
    wide = next_power_of_2(min(heads, 64))
    row = block_d * element_size
    # Rows in use and rows on their way, the queries, the weights.
    if wide == 64 and (64 + 2 * 64) * row + 16 * 1024 <= device.shared_memory:
        slices = 2 if 2 * tokens * cdiv(heads, 64) <= device.multiprocessors else 1
        if slices == 2 and tokens >= 32 and not codes:
            return Config(64, 32, 4, 4, 128, slices)
        block_n, stages = (64, 2) if tokens >= 32 and not codes else (32, 3)
        return Config(64, block_n, 8, stages, 128 if tokens >= 32 else 32, slices)
    for block_n, stages in ((32, 3), (32, 2), (16, 3), (16, 2)):
        if (16 + stages * block_n) * row + 8 * 1024 <= device.shared_memory:
            return Config(16, block_n, 4, stages, 2 * block_n)
    return Config(16, 16, 4, 1, 32)


def splits(tokens: int, groups: int, most_rows: int, config: Config, device: DeviceLimits) -> int:
    """Parts that the rows of a token are cut into, at most; it follows from shapes alone."""
    programs = device.multiprocessors * (1 if config.block_m == 64 else 2)
    here = max(1, tokens * groups * config.slices)
    return max(1, min(programs // here, cdiv(most_rows, config.least)))


def sparse_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    compressed: Tensor | None,
    compressed_tables: Tensor | None,
    selected: Tensor | None,
    sinks: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    every: int,
    query_len: int,
    cache_tail: Tensor | None = None,
    scales: Tensor | None = None,
    compressed_tail: Tensor | None = None,
    compressed_scales: Tensor | None = None,
) -> None:
    """Shapes as in the reference."""
    bind(
        query, cache, block_tables, compressed, compressed_tables, selected, sinks, seq_lens,
        query_start_loc, out, scale, sliding_window, every, query_len,
        cache_tail, scales, compressed_tail, compressed_scales,
    )  # fmt: skip


def bind(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    compressed: Tensor | None,
    compressed_tables: Tensor | None,
    selected: Tensor | None,
    sinks: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int,
    every: int,
    query_len: int,
    cache_tail: Tensor | None = None,
    scales: Tensor | None = None,
    compressed_tail: Tensor | None = None,
    compressed_scales: Tensor | None = None,
) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    tokens, heads, size = query.shape
    requests = len(seq_lens)
    device = limits(query.device)
    config = attention_config(tokens, heads, size, query.element_size(), scales is not None, device)
    groups = cdiv(heads, config.block_m)
    most, kind = sliding_window, 0
    if compressed is not None and selected is not None:
        most, kind = most + selected.shape[1], 1
    elif compressed is not None and compressed_tables is not None:
        most, kind = most + compressed_tables.shape[1] * compressed.shape[1], 2
    rows, rows_tail, rows_scales = cache, cache_tail, scales
    if compressed is not None:
        rows, rows_tail, rows_scales = compressed, compressed_tail, compressed_scales
    tables = block_tables if compressed_tables is None else compressed_tables
    chosen = tables if selected is None else selected
    parts = splits(tokens, groups, most, config, device)
    block_d = next_power_of_2(size)
    tail = 0 if cache_tail is None else cache_tail.shape[2]
    inputs = (
        query,
        cache,
        cache_tail,
        scales,
        block_tables,
        rows,
        rows_tail,
        rows_scales,
        tables,
        chosen,
        sinks,
        seq_lens,
        query_start_loc,
        out,
    )
    numbers = (
        requests, *query.stride()[:2], *row_strides(cache, cache_tail, scales),
        block_tables.stride(0), *row_strides(rows, rows_tail, rows_scales), tables.stride(0),
        chosen.stride(0), *out.stride()[:2], scale * _LOG2_E,
    )  # fmt: skip
    options = {
        "HEADS": heads, "SIZE": size, "WINDOW": sliding_window, "EVERY": every, "KIND": kind,
        "TOP": chosen.shape[1] if kind == 1 else 1, "BLOCK_SIZE": cache.shape[1],
        "ROWS_BLOCK": rows.shape[1], "PARTS": parts, "LEAST": config.least,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d,
        "BLOCK_R": block_of(requests), "CHUNK": max(config.block_n, _CHUNK),
        "BLOCK_W": next_power_of_2(sliding_window // cache.shape[1] + 2),
        "BLOCK_TOP": next_power_of_2(chosen.shape[1]) if kind == 1 else 1,
        "SLICES": config.slices, "EACH": 0 if scales is None else cache.shape[-1],
        "TAIL": tail, "BLOCK_T": max(16, next_power_of_2(tail)),
        "PAIRS": in_pairs(query, cache), "WIDEN": INTERPRETED, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **launch_options(),
    }  # fmt: skip
    if tokens == 0:
        return lambda: None

    def scratch() -> tuple[Tensor, Tensor]:
        shape = (parts, tokens, heads) if parts > 1 else (0, 0, 0)
        found = query.new_empty((*shape, size), dtype=torch.float32)
        return found, query.new_empty((*shape, config.slices), dtype=torch.float32)

    found, sums = scratch()
    again = launch(sparse_attention_kernel, (tokens, groups * config.slices, parts))(
        *inputs, found, sums, tokens, *numbers, **options
    )
    if parts == 1:
        return lambda: again(*inputs, *scratch(), tokens, *numbers)
    block = min(128, block_d // config.slices)
    merged = {
        "HEADS": heads, "SIZE": size, "PARTS": parts, "SLICES": config.slices,
        "SLICE": block_d // config.slices, "BLOCK": block, "STEP": min(32, next_power_of_2(parts)),
        "num_warps": 4, **launch_options(),
    }  # fmt: skip
    merge = launch(sparse_merge_kernel, (tokens, heads, cdiv(size, block)))(
        found, sums, sinks, out, tokens, *out.stride()[:2], **merged
    )

    def repeat() -> None:
        found, sums = scratch()
        again(*inputs, found, sums, tokens, *numbers)
        merge(found, sums, sinks, out, tokens, *out.stride()[:2])

    return repeat


sparse_attention.bind = bind  # type: ignore[attr-defined]

"""The indexer in Triton: scores, then the choice."""

from collections.abc import Callable

from torch import Tensor

from reprise.ops.indexer.accepts import LEAST, chunks_of, group_of
from reprise.ops.indexer.scores_kernel import index_scores_kernel
from reprise.ops.indexer.top_kernel import index_last_kernel, index_top_kernel
from reprise.ops.load_codes import in_pairs
from reprise.ops.request_of import block_of
from reprise.ops.triton_util import (
    INTERPRETED,
    cdiv,
    launch,
    launch_options,
    limits,
    next_power_of_2,
    warps,
)

_MOST_SCORES = 1 << 24
"""Of tokens that are scored at once: the rest comes after them, in the same memory."""


def indexer(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    every: int,
    scale: float,
    query_len: int,
    scales: Tensor | None = None,
) -> None:
    """Shapes as in the reference."""
    bind(
        query, weights, keys, block_tables, seq_lens, query_start_loc, out, every, scale, query_len,
        scales,
    )  # fmt: skip


def bind(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    every: int,
    scale: float,
    query_len: int,
    scales: Tensor | None = None,
) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    tokens, heads, size = query.shape
    requests, top = len(seq_lens), out.shape[1]
    if tokens == 0 or top == 0:
        return lambda: None
    room = max(1, block_tables.shape[1] * keys.shape[1])
    at_once = min(tokens, max(1, _MOST_SCORES // room))
    # The interpreter's chunks are so small that there are several.
    chunk, chunks = (
        chunks_of(room, top, max(16, cdiv(room, 8))) if INTERPRETED else chunks_of(room, top)
    )
    wide = query.element_size() == 4
    block_n = 32 if wide or INTERPRETED else 64
    parts = max(1, min(cdiv(room, block_n), 4 * limits(query.device).multiprocessors // at_once))
    block_r = block_of(requests)
    shared = {"EVERY": every, "BLOCK_R": block_r, **launch_options()}
    score = {
        "HEADS": heads, "SIZE": size, "BLOCK": keys.shape[1], "BLOCK_N": block_n,
        "BLOCK_H": max(16, next_power_of_2(heads)), "BLOCK_D": max(16, next_power_of_2(size)),
        "CODES": scales is not None, "PAIRS": in_pairs(query, keys),
        "WIDEN": INTERPRETED, "num_warps": 4,
        "num_stages": 1 if wide else 3, **shared,
    }  # fmt: skip
    of_scales = (0, 0) if scales is None else scales.stride()
    group = group_of(room, top, block_n, 2 if INTERPRETED else 16) if chunks > 1 else 0
    groups = cdiv(room, group) if group else 0
    score["GROUP"] = group
    most = next_power_of_2(max(LEAST, chunks * top))
    choose = {"TOP": top, "CHUNK": chunk, "BLOCK": keys.shape[1], **shared}
    of_chunk = {
        "SEVERAL": chunks > 1, "GROUP": group, "PEAKS": next_power_of_2(max(LEAST, groups)),
        "num_warps": max(4, warps(chunk, per_thread=8)), **choose,
    }  # fmt: skip
    # So many that each of MOST places is there.
    room_left = cdiv(most, top) if chunks > 1 else 0
    # Groups tell of little more rows than are asked for.
    slots = min(most, next_power_of_2(max(LEAST, 2 * top)))
    of_all = {
        "CHUNKS": next_power_of_2(chunks), "SLOTS": slots, "MOST": most,
        "PART": min(most, 16 if INTERPRETED else 4096),
        "num_warps": max(4, warps(slots, per_thread=4)), **choose,
    }  # fmt: skip

    def compute() -> None:
        scores = block_tables.new_empty((at_once, room))
        peaks = scores.new_empty((at_once, groups))
        left = scores.new_empty((at_once, room_left, 2, top))
        found = scores.new_empty((at_once, 3, room_left))
        for first in range(0, tokens, at_once):
            count = min(at_once, tokens - first)
            where = (seq_lens, query_start_loc, requests, first)
            launch(index_scores_kernel, (count, parts))(
                query, weights, keys, scales, block_tables, scores, peaks, *where, room,
                *query.stride(), *weights.stride(), *keys.stride(), *of_scales,
                block_tables.stride(0), scale, **score,
            )  # fmt: skip
            target = block_tables, out, left, found, *where, room, room_left
            strides = block_tables.stride(0), *out.stride()
            launch(index_top_kernel, (count, chunks))(scores, peaks, *target, *strides, **of_chunk)
            if chunks > 1:
                launch(index_last_kernel, (count,))(*target, *strides, **of_all)

    compute()
    return compute


indexer.bind = bind  # type: ignore[attr-defined]

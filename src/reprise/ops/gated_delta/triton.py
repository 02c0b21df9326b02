"""The gated delta rule in Triton: one kernel for decodes; for prompts one that prepares all chunks
and one that takes states through them."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from reprise.ops.gated_delta.chunk_kernels import delta_chunk_kernel, delta_scan_kernel
from reprise.ops.gated_delta.recurrent_kernel import delta_keep_kernel, delta_tokens_kernel
from reprise.ops.triton_util import (
    APART,
    INTERPRETED,
    cdiv,
    launch,
    launch_options,
    limits,
    next_power_of_2,
)

_CHUNK = 64
_SHORT = 8
"""New tokens of a request up to which it is computed token by token in any step."""
_ANY = 1 << 30
"""The same, where all are."""
_TOKEN_PART, _TOKEN_WARPS = 8, 1
"""Channels of a head that one program computes token by token, and its warps."""
_KEEP = 1024
"""Channels of a token that one program keeps."""
_LEAST = 16 if INTERPRETED else 128
"""Columns of a tile of the chunk kernels. Heads of released models have 128; for tiles of 16 and 32
columns of two-byte numbers Triton 3.6 makes code that faults on an H100."""
_CHUNK_WARPS = 4
_SCAN_PART, _SCAN_WARPS, _SCAN_STAGES = 32, 4, 3
"""Channels of a head that one program takes through the chunks, its warps, chunks under way."""


def gated_delta(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    fresh: Tensor,
    out: Tensor,
    query_len: int,
    recent: Tensor | None = None,
    gates: Tensor | None = None,
    accepted: Tensor | None = None,
    known: Tensor | None = None,
    places: Tensor | None = None,
    by_token: bool = False,
) -> None:
    """Shapes as in the reference.

    Args:
        by_token: Compute every request token by token, by one code however many tokens it has, so
            that bits do not depend on where a step ends.
    """
    tokens, requests = len(qkv), len(slots)
    _, heads, values, keys = state.shape
    group = heads // ((qkv.shape[1] - heads * values) // (2 * keys))
    inputs = qkv, a, b, a_log, dt_bias
    states = state, recent, gates
    step = slots, query_start_loc, seq_lens, fresh, accepted
    in_strides = qkv.stride(0), a.stride(0), b.stride(0)
    drafts = 0 if recent is None else recent.shape[1]
    strides = state.stride(0), _stride(recent), _stride(gates), slots.stride(0)
    sizes = {"GROUP": group, "HEADS": heads, "KEYS": keys, "VALUES": values}
    block_k, block_v = next_power_of_2(keys), next_power_of_2(values)
    # Who verifies drafts is computed token by token.
    short = _ANY if by_token else max(_SHORT, drafts)
    all_short = by_token or 0 < query_len <= short
    each = query_len if all_short and not by_token and tokens == requests * query_len else 0
    # Tokens that are replayed and those that are new are rounded alike.
    fusion = APART if by_token else {}
    if not each:
        out.zero_()
    part = min(_TOKEN_PART, block_v)
    launch(delta_tokens_kernel, (requests, heads, cdiv(values, part)))(
        *inputs, *states, *step, known, out, *in_strides, *strides,
        EACH=each, MOST=short, **sizes, BLOCK_K=block_k, BLOCK_V=part,
        num_warps=_TOKEN_WARPS, **fusion, **launch_options(),
    )  # fmt: skip
    if not all_short:
        _long(inputs, states, step, out, in_strides, strides, short, sizes)
    if recent is not None:
        grid = requests, drafts, cdiv(recent.shape[2], _KEEP)
        launch(delta_keep_kernel, grid)(
            *inputs, recent, gates, slots, query_start_loc, seq_lens, known, places,
            *in_strides, *strides[1:], **sizes, BLOCK=_KEEP, BLOCK_H=next_power_of_2(heads),
            num_warps=4, **fusion, **launch_options(),
        )  # fmt: skip


invariant = functools.partial(gated_delta, by_token=True)
"""The bits of a token depend on its request's tokens alone."""


def _stride(kept: Tensor | None) -> int:
    return 0 if kept is None else kept.stride(0)


def _long(
    inputs: Sequence[Tensor],
    states: Sequence[Tensor | None],
    step: Sequence[Tensor | None],
    out: Tensor,
    in_strides: Sequence[int],
    strides: Sequence[int],
    short: int,
    sizes: Mapping[str, int],
) -> None:
    """Requests with more than ``short`` new tokens, chunk by chunk."""
    qkv, (slots, starts, lengths, *_) = inputs[0], step
    assert slots is not None
    tokens, requests = len(qkv), len(slots)
    _, heads, values = out.shape
    block_k, block_v = (max(_LEAST, next_power_of_2(sizes[each])) for each in ("KEYS", "VALUES"))
    chunks = tokens // _CHUNK + min(requests, cdiv(tokens, short + 1))

    def scratch(columns: int) -> Tensor:
        return qkv.new_empty((chunks, heads, _CHUNK, columns))

    own, of_state, from_state, kept = map(scratch, (block_v, block_k, block_k, block_k))
    seen = scratch(_CHUNK)
    last = qkv.new_empty((chunks, heads), dtype=torch.float32)
    made = own, of_state, from_state, kept, seen, last
    shared = {
        "SHORT": short, "REQUESTS": next_power_of_2(requests), "BLOCK_K": block_k,
        "PRECISION": _precision(qkv.dtype), "WIDEN": INTERPRETED, **sizes,
    }  # fmt: skip
    launch(delta_chunk_kernel, (chunks, heads))(
        *inputs, starts, lengths, *made, *in_strides, requests, BLOCK_V=block_v, **shared,
        num_warps=_CHUNK_WARPS, **launch_options(),
    )  # fmt: skip
    part = min(_SCAN_PART, block_v)
    # Bytes that the loop reads for one chunk.
    stage = qkv.element_size() * _CHUNK * (3 * block_k + _CHUNK + part)
    stages = max(1, min(_SCAN_STAGES, limits(qkv.device).shared_memory // stage))
    launch(delta_scan_kernel, (cdiv(values, part), heads, requests))(
        *made, *states, *step, out, *strides, requests, ALL_V=block_v, BLOCK_V=part, **shared,
        num_warps=_SCAN_WARPS, num_stages=stages, **launch_options(),
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """Input precision of products of float32 numbers. Three products of matrix units are as exact
    as float32, one is enough where the results are rounded to a shorter dtype anyway. (Without
    matrix units such tiles fit in no registers: on an H100 the compiler spilled 8 KiB a thread.)"""
    wanted = "tf32x3" if dtype == torch.float32 else "tf32"
    return wanted if not INTERPRETED and wanted in _precisions() else "ieee"


@functools.cache
def _precisions() -> Sequence[str]:
    """Input precisions that the device's matrix units know."""
    options = make_backend(driver.active.get_current_target()).parse_options({})
    return tuple(options.allowed_dot_input_precisions)

"""The gated delta rule in Triton: one kernel for decodes; for prompts one that prepares all chunks
and one that takes states through them."""

import functools

import torch
from torch import Tensor
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from reprise.ops.gated_delta.chunk_kernels import delta_chunk_kernel, delta_scan_kernel
from reprise.ops.gated_delta.recurrent_kernel import delta_tokens_kernel
from reprise.ops.triton_util import (
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
_TOKEN_PART, _TOKEN_WARPS = 32, 4
"""Channels of a head that one program computes token by token, and its warps."""
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
) -> None:
    """Shapes as in the reference; but no drafts."""
    tokens, requests = len(qkv), len(slots)
    _, heads, values, keys = state.shape
    group = heads // ((qkv.shape[1] - heads * values) // (2 * keys))
    step = slots, query_start_loc, seq_lens, fresh
    strides = qkv.stride(0), a.stride(0), b.stride(0)
    sizes = {"HEADS": heads, "KEYS": keys, "VALUES": values}
    block_k, block_v = next_power_of_2(keys), next_power_of_2(values)
    single = query_len == 1 and tokens == requests
    if not single:
        out.zero_()
    part = min(_TOKEN_PART, block_v)
    launch(delta_tokens_kernel, (requests, heads, cdiv(values, part)))(
        qkv, a, b, a_log, dt_bias, state, *step, out, *strides, state.stride(0),
        MOST=1 if single else _SHORT, GROUP=group, **sizes, BLOCK_K=block_k, BLOCK_V=part,
        num_warps=_TOKEN_WARPS, **launch_options(),
    )  # fmt: skip
    if single or 0 < query_len <= _SHORT:
        return
    block_k, block_v = max(16, block_k), max(16, block_v)
    chunks = tokens // _CHUNK + min(requests, cdiv(tokens, _SHORT + 1))

    def scratch(columns: int) -> Tensor:
        return qkv.new_empty((chunks, heads, _CHUNK, columns))

    own, of_state, from_state, kept = map(scratch, (block_v, block_k, block_k, block_k))
    seen = scratch(_CHUNK)
    last = qkv.new_empty((chunks, heads), dtype=torch.float32)
    made = own, of_state, from_state, kept, seen, last
    shared = {
        "SHORT": _SHORT, "REQUESTS": next_power_of_2(requests), "BLOCK_K": block_k,
        "WIDEN": INTERPRETED, **sizes,
    }  # fmt: skip
    launch(delta_chunk_kernel, (chunks, heads))(
        qkv, a, b, a_log, dt_bias, query_start_loc, seq_lens, *made, *strides, requests,
        GROUP=group, BLOCK_V=block_v, PRECISION=_precision(qkv.dtype), **shared,
        num_warps=_CHUNK_WARPS, **launch_options(),
    )  # fmt: skip
    part = min(_SCAN_PART, block_v)
    # Bytes that the loop reads for one chunk.
    stage = qkv.element_size() * _CHUNK * (3 * block_k + _CHUNK + part)
    stages = max(1, min(_SCAN_STAGES, limits(qkv.device).shared_memory // stage - 1))
    launch(delta_scan_kernel, (cdiv(values, part), heads, requests))(
        *made, state, *step, out, state.stride(0), requests,
        ALL_V=block_v, BLOCK_V=part, **shared,
        num_warps=_SCAN_WARPS, num_stages=stages, **launch_options(),
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32 numbers. Where the results are rounded to a shorter dtype anyway,
    matrix units may compute them, if they take what is nearly float32."""
    return "ieee" if dtype == torch.float32 or INTERPRETED else _matrix_precision()


@functools.cache
def _matrix_precision() -> str:
    options = make_backend(driver.active.get_current_target()).parse_options({})
    return "tf32" if "tf32" in options.allowed_dot_input_precisions else "ieee"

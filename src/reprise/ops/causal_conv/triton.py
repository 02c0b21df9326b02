# mypy: allow-untyped-defs, no-check-untyped-defs
import functools

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import APART, cdiv, depend, launch, launch_options, next_power_of_2

_CHANNELS = 512
"""Of a program that computes one token a request."""
_TOKENS, _COLUMNS = 16, 128
"""Of a program that computes tokens that adjoin."""


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    fresh: Tensor,
    out: Tensor,
    query_len: int,
    accepted: Tensor | None = None,
    known: Tensor | None = None,
    places: Tensor | None = None,
    one_code: bool = False,
) -> None:
    """Shapes as in the reference.

    Args:
        one_code: Sum by the same code in any step, so that bits do not depend on where one ends.
    """
    tokens, size = x.shape
    requests, taps = len(slots), weight.shape[1]
    step = slots, query_start_loc, seq_lens, fresh, accepted
    told = known, places
    strides = x.stride(0), state.stride(0), slots.stride(0)
    sizes = {"SIZE": size, "TAPS": taps}
    kept = state.shape[1]
    if query_len == 1 and tokens == requests and not one_code:
        grid = (requests, cdiv(size, _CHANNELS))
        launch(conv_one_token_kernel, grid)(
            x, weight, state, *step, *told, out, *strides,
            **sizes, KEPT=kept, BLOCK=_CHANNELS, num_warps=4, **launch_options(),
        )  # fmt: skip
        return
    launch(conv_tokens_kernel, (cdiv(tokens, _TOKENS), cdiv(size, _COLUMNS)))(
        x, weight, state, *step, out, *strides, tokens, requests,
        **sizes, TOKENS=_TOKENS, REQUESTS=next_power_of_2(requests), BLOCK=_COLUMNS,
        num_warps=4, **(APART if one_code else {}), **launch_options(),
    )  # fmt: skip
    # Only then: the first tokens of a request read what it overwrites.
    launch(conv_state_kernel, (requests, cdiv(size, _CHANNELS)))(
        x, state, *step, *told, *strides, **sizes, KEPT=kept, ROWS=next_power_of_2(kept),
        BLOCK=_CHANNELS, num_warps=4, **launch_options(),
    )  # fmt: skip


invariant = functools.partial(causal_conv, one_code=True)
"""The bits of a token depend on its request's tokens alone."""


@triton.jit
def _activated(total):
    return total / (1 + tl.exp(-total))


@triton.jit
def _first(accepted_ptr, row):
    """Of a slot's inputs the first that comes before the step: others were of wrong drafts."""
    first = row.to(tl.int32) * 0
    if accepted_ptr is not None:
        first = tl.maximum(tl.load(accepted_ptr + row) - 1, 0)
    return first


@triton.jit
def conv_one_token_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    fresh_ptr,
    accepted_ptr,
    known_ptr,
    places_ptr,
    out_ptr,
    x_stride,
    slot_stride,
    slots_stride,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK channels of a request's one token, and moves its window on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    live = tl.load(lengths_ptr + row) > 0
    # Padding has no channels, and who is fresh none that are old.
    real = column < tl.where(live, SIZE, 0)
    old = column < tl.where(live & (tl.load(fresh_ptr + row) == 0), SIZE, 0)
    slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
    depend(EARLY)
    window = state_ptr + slot * slot_stride + column
    first = _first(accepted_ptr, row)
    new = tl.load(x_ptr + row * x_stride + column, mask=real, other=0.0)
    last = tl.load(weight_ptr + column * TAPS + TAPS - 1, mask=inside, other=0.0)
    total = new.to(tl.float32) * last.to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        past = tl.load(window + (first + tap) * SIZE, mask=old, other=0.0)
        weight = tl.load(weight_ptr + column * TAPS + tap, mask=inside, other=0.0)
        total += past.to(tl.float32) * weight.to(tl.float32)
        if tap > 0:
            tl.store(window + (tap - 1) * SIZE, past, mask=real)
    if known_ptr is not None:
        read = (tl.load(known_ptr + row) > 0) | (tl.load(places_ptr + row) != 0)
        new = tl.where(read, new, 0.0)
    tl.store(window + (TAPS - 2) * SIZE, new, mask=real)
    for place in tl.static_range(TAPS - 1, KEPT):
        tl.store(window + place * SIZE, tl.zeros_like(new), mask=real)
    y = tl.where(real, _activated(total), 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * SIZE + column, y, mask=inside)


@triton.jit(do_not_specialize=["tokens", "requests"])
def conv_tokens_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    fresh_ptr,
    accepted_ptr,
    out_ptr,
    x_stride,
    slot_stride,
    slots_stride,
    tokens,
    requests,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program computes BLOCK channels of TOKENS tokens, of whatever requests."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < SIZE
    number = tl.arange(0, REQUESTS)
    ends = tl.load(starts_ptr + 1 + number, mask=number < requests, other=2147483647)
    request = tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)
    some = (request < requests) & (token < tokens)
    request = tl.where(some, request, 0)
    live = some & (tl.load(lengths_ptr + request) > 0)
    old = live & (tl.load(fresh_ptr + request) == 0)
    since = token - tl.load(starts_ptr + request)
    slot = tl.load(slots_ptr + request * slots_stride).to(tl.int64)
    depend(EARLY)
    rows = x_ptr + token.to(tl.int64)[:, None] * x_stride + column
    first = _first(accepted_ptr, request)
    window = state_ptr + slot[:, None] * slot_stride + column
    total = tl.zeros([TOKENS, BLOCK], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        here = (live & (since >= TAPS - 1 - tap))[:, None] & inside
        x = tl.load(rows - (TAPS - 1 - tap) * x_stride, mask=here, other=0.0).to(tl.float32)
        if tap < TAPS - 1:
            before = (old & (since < TAPS - 1 - tap))[:, None] & inside
            place = (first + since + tap)[:, None] * SIZE
            x += tl.load(window + place, mask=before, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column * TAPS + tap, mask=inside, other=0.0)
        total += x * weight.to(tl.float32)
    y = tl.where(live[:, None], _activated(total), 0.0).to(out_ptr.dtype.element_ty)
    target = out_ptr + token.to(tl.int64)[:, None] * SIZE + column
    tl.store(target, y, mask=(token < tokens)[:, None] & inside)


@triton.jit
def conv_state_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    starts_ptr,
    lengths_ptr,
    fresh_ptr,
    accepted_ptr,
    known_ptr,
    places_ptr,
    x_stride,
    slot_stride,
    slots_stride,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK channels of a request's window that of its last tokens, or of all
    those of which it is not known yet which count."""
    row = tl.program_id(0)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    start = tl.load(starts_ptr + row)
    new = tl.load(starts_ptr + row + 1) - start
    live = (tl.load(lengths_ptr + row) > 0) & (new > 0)
    inside = column < tl.where(live, SIZE, 0)
    old = column < tl.where(live & (tl.load(fresh_ptr + row) == 0), SIZE, 0)
    slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
    depend(EARLY)
    place = tl.arange(0, ROWS)[:, None]
    # Of each input that is kept, its token's number among the request's new ones.
    since = new - (TAPS - 1) + place
    some = since < new
    if known_ptr is not None:
        verifies = tl.load(known_ptr + row) == 0
        since = place + tl.where(verifies, 2 - TAPS, new - (TAPS - 1))
        some = since < new
        drafted = some & (since >= tl.where(verifies, 0, new))
        # What nobody reads are zeros.
        some = some & (tl.load(places_ptr + start + since, mask=drafted, other=1) != 0)
    window = state_ptr + slot * slot_stride
    x = tl.load(
        x_ptr + (start + since).to(tl.int64) * x_stride + column,
        mask=some & (since >= 0) & inside, other=0.0,
    )  # fmt: skip
    before = _first(accepted_ptr, row) + TAPS - 1 + since
    past = tl.load(window + before * SIZE + column, mask=some & (since < 0) & old, other=0.0)
    # Every element is moved towards the front: all are read before one is written.
    tl.debug_barrier()
    tl.store(
        window + place * SIZE + column, tl.where(since >= 0, x, past), mask=(place < KEPT) & inside
    )

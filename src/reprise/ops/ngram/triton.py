import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.step.reference import COMPUTED, NEXT
from reprise.ops.triton_util import launch

_BLOCK = 1024


def ngram(
    numbers: Tensor,
    tokens: Tensor,
    rows: Tensor,
    emitted: Tensor,
    most: int,
    least: int,
    drafts: int,
) -> None:
    """Arguments as in the reference; rows of ``tokens`` and ``emitted`` may be strided."""
    launch(ngram_kernel, (rows.shape[0],))(
        numbers, tokens, rows, emitted, numbers.stride(0), tokens.stride(0), emitted.stride(0),
        tokens.shape[1], WIDTH=emitted.shape[1], MOST=most, LEAST=least, DRAFTS=drafts,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


assert (COMPUTED, NEXT) == (0, 4), "as the kernel has them"


@triton.jit
def ngram_kernel(
    numbers_ptr,
    tokens_ptr,
    rows_ptr,
    emitted_ptr,
    numbers_stride,
    tokens_stride,
    emitted_stride,
    length,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program drafts for one request."""
    NEXT: tl.constexpr = 4
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    text_ptr = tokens_ptr + row * tokens_stride
    newest = tl.load(numbers_ptr + row)
    emitted_ptr += request * emitted_stride
    count = 0
    for turn in tl.static_range(WIDTH):
        count += (tl.load(emitted_ptr + turn) >= 0).to(tl.int32)
    for turn in tl.static_range(WIDTH):
        token = tl.load(emitted_ptr + turn)
        place = newest + 1 - count + turn
        fits = (token >= 0) & (place >= 0) & (place < length)
        if fits:
            tl.store(text_ptr + place, token.to(tl.int32))
    # All threads read what one has written.
    tl.debug_barrier()
    end = tl.minimum(newest + 1, length)
    best = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, end.to(tl.int32), BLOCK):
        ends = start + tl.arange(0, BLOCK)
        goes_on = (ends >= 1) & (ends < end)
        equal = tl.zeros([BLOCK], dtype=tl.int64)
        for back in tl.static_range(1, MOST + 1):
            last = tl.load(text_ptr + tl.maximum(end - back, 0))
            inside = goes_on & (ends >= back)
            earlier = tl.load(text_ptr + ends - back, mask=inside, other=-2)
            goes_on = inside & (earlier == last)
            equal += goes_on.to(tl.int64)
        best = tl.maximum(best, equal * (length + 1) + (length - ends))
    found = tl.max(best, axis=0)
    place = length - found % (length + 1)
    drafts = ((found // (length + 1)) >= LEAST) & (count > 0)
    for turn in tl.static_range(DRAFTS):
        inside = drafts & ((place + turn) < end)
        token = tl.load(text_ptr + tl.minimum(place + turn, length - 1))
        token = tl.where(inside, token, -1)
        tl.store(numbers_ptr + (NEXT + 1 + turn) * numbers_stride + row, token.to(tl.int64))

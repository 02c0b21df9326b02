import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.apply_penalties.reference import IN_PROMPT
from reprise.ops.triton_util import cdiv, depend, launch, launch_options

_BLOCK = 4096


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    seen: Tensor,
    slots: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    drafted: Tensor,
) -> None:
    """Arguments as in the reference; rows of ``logits`` and ``seen`` may be strided."""
    vocab = logits.shape[1]
    launch(apply_penalties_kernel, (cdiv(vocab, _BLOCK), len(rows)))(
        logits, rows, seen, slots, repetition, presence, frequency, drafted,
        logits.stride(0), seen.stride(0), vocab,
        IN_PROMPT=IN_PROMPT, DRAFTED=drafted.shape[1], BLOCK=_BLOCK, num_warps=8,
        **launch_options(),
    )  # fmt: skip


@triton.jit
def apply_penalties_kernel(
    logits_ptr,
    rows_ptr,
    seen_ptr,
    slots_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    drafted_ptr,
    row_stride,
    slot_stride,
    vocab,
    IN_PROMPT: tl.constexpr,
    DRAFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program changes BLOCK logits of a row."""
    number = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    depend(EARLY)
    logits_ptr += tl.load(rows_ptr + number) * row_stride
    seen_ptr += tl.load(slots_ptr + number) * slot_stride
    known = tl.load(seen_ptr + token, mask=inside, other=0)
    for turn in tl.static_range(DRAFTED):
        known += (token == tl.load(drafted_ptr + number * DRAFTED + turn)).to(tl.int32)
    x = tl.load(logits_ptr + token, mask=inside, other=0.0)
    count = known & (IN_PROMPT - 1)
    factor = tl.load(repetition_ptr + number)
    x = tl.where(known > 0, tl.where(x > 0, x / factor, x * factor), x)
    x -= count.to(tl.float32) * tl.load(frequency_ptr + number)
    x = tl.where(count > 0, x - tl.load(presence_ptr + number), x)
    tl.store(logits_ptr + token, x, mask=inside)

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options

_BLOCK = 4096


def apply_bitmask(logits: Tensor, which: Tensor, bits: Tensor) -> None:
    """Arguments as in the reference; rows of ``logits`` and ``bits`` may be strided."""
    vocab = logits.shape[1]
    launch(apply_bitmask_kernel, (cdiv(vocab, _BLOCK), len(logits)))(
        logits, which, bits, logits.stride(0), bits.stride(0), vocab,
        BLOCK=_BLOCK, num_warps=8, **launch_options(),
    )  # fmt: skip


@triton.jit
def apply_bitmask_kernel(
    logits_ptr,
    which_ptr,
    bits_ptr,
    row_stride,
    bits_stride,
    vocab,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program looks at BLOCK tokens of a row, and writes those that are not allowed."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depend(EARLY)
    mask = tl.load(which_ptr + row)
    masked = tl.where(mask < 0, 0, vocab)  # tokens that the mask is about
    words = tl.load(bits_ptr + mask * bits_stride + token // 32, mask=token < masked, other=-1)
    forbidden = ((words >> (token % 32)) & 1) == 0
    tl.store(logits_ptr + row * row_stride + token, float("-inf"), mask=forbidden)

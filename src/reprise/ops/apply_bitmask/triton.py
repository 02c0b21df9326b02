import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options

_PART = 4096
"""Tokens of a row that one program takes."""


def apply_bitmask(logits: Tensor, which: Tensor, bits: Tensor) -> Tensor:
    """Arguments as in the reference; rows of ``logits`` and ``bits`` may be strided."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if bits.stride(1) != 1:
        bits = bits.contiguous()
    rows, vocab = logits.shape
    out = logits.new_empty((rows, vocab), dtype=torch.float32)
    launch(apply_bitmask_kernel, (cdiv(vocab, _PART), rows))(
        logits, which, bits, out, logits.stride(0), bits.stride(0), vocab,
        BLOCK=_PART, num_warps=4, **launch_options(),
    )  # fmt: skip
    return out


@triton.jit
def allowed_by(bits_ptr, bits_stride, mask, word, vocab):
    """[W, 32] bool: whether the tokens of some words ([W]) of a mask may come; all where it is
    negative. A word is read once for its tokens."""
    masked = tl.where(mask < 0, 0, vocab)  # tokens that the mask is about
    words = tl.load(bits_ptr + mask * bits_stride + word, mask=word * 32 < masked, other=-1)
    return ((words[:, None] >> tl.arange(0, 32)[None, :]) & 1) == 1


@triton.jit
def apply_bitmask_kernel(
    logits_ptr,
    which_ptr,
    bits_ptr,
    out_ptr,
    stride,
    bits_stride,
    vocab,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes BLOCK tokens of a row."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    token = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = token < vocab
    depend(EARLY)
    mask = tl.load(which_ptr + row)
    value = tl.load(logits_ptr + row * stride + token, mask=inside, other=0.0).to(tl.float32)
    allowed = allowed_by(bits_ptr, bits_stride, mask, word, vocab)
    value = tl.where(allowed, value, -float("inf"))
    tl.store(out_ptr + row * vocab + token, value, mask=inside)

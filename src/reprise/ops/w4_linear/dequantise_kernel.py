# mypy: allow-untyped-defs, no-check-untyped-defs
"""A weight of four bits made a plain one in Triton, for products of many rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import cdiv, depend, launch, launch_options
from reprise.ops.w4_linear.unpack import unpacked

_FEATURES, _WORDS = 16, 64


def dequantise(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """[N, 8 * W] in the dtype of the scales, as the reference has it.

    Args:
        packed: [N, W].
        scales: [N, 8 * W / group].
        zeros: The same, or None.
        group: Inputs that share a scale, a multiple of 8.
    """
    outputs, words = packed.shape
    out = scales.new_empty((outputs, 8 * words))
    launch(w4_dequantise_kernel, (cdiv(outputs, _FEATURES), cdiv(words, _WORDS)))(
        packed,
        scales,
        zeros,
        out,
        outputs,
        WORDS=words,
        GROUP=group,
        BLOCK_N=_FEATURES,
        BLOCK_W=_WORDS,
        num_warps=4,
        **launch_options(),
    )
    return out


@triton.jit
def w4_dequantise_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    outputs,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes [BLOCK_N, 8 * BLOCK_W]."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    word = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    real = (n < outputs) & (word < WORDS)
    packed = tl.load(packed_ptr + n * WORDS + word, mask=real, other=0)
    group = n * (WORDS * 8 // GROUP) + word * 8 // GROUP
    scale = tl.load(scales_ptr + group, mask=real, other=0.0).to(tl.float32)
    middle = 8.0
    if zeros_ptr is not None:
        middle = tl.load(zeros_ptr + group, mask=real, other=0).to(tl.float32)[:, :, None]
    depend(EARLY)  # the memory of ``out`` may have been another's until now
    number = tl.reshape(unpacked(packed), [BLOCK_N, BLOCK_W, 8]).to(tl.float32)
    value = (number - middle) * scale[:, :, None]
    place = (n * WORDS + word)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = tl.broadcast_to(real[:, :, None], [BLOCK_N, BLOCK_W, 8])
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)

# mypy: allow-untyped-defs, no-check-untyped-defs
"""Eight-bit numbers of caches in registers of kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.ops.triton_util import takes_ptx


def in_pairs(like: Tensor, cache: Tensor) -> bool:
    """PAIRS of :func:`plain`, for numbers of the dtype of ``like``."""
    types = like.dtype, cache.dtype
    return types == (torch.bfloat16, torch.float8_e4m3fn) and takes_ptx()


@triton.jit
def plain(codes, kind: tl.constexpr, PAIRS: tl.constexpr):
    """What codes stand for, as ``kind``, which holds it.

    PAIRS: they are e4m3, ``kind`` is bfloat16, and a kernel may have PTX: five instructions make
    two, where conversions by way of float16 are few a cycle. What is no number has a scale that is
    none, and may be any here.
    """
    if PAIRS:
        numbers = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair, rest, nothing, large, minus;
            mov.b32 nothing, 0;
            mov.b32 large, 0x7B807B80;
            mov.b32 minus, 0x80008000;
            prmt.b32 pair, $2, nothing, 0x1404;
            shr.u32 rest, pair, 4;
            and.b32 rest, rest, 0x07F007F0;
            and.b32 pair, pair, minus;
            or.b32 pair, pair, rest;
            fma.rn.bf16x2 $0, pair, large, minus;
            prmt.b32 pair, $2, nothing, 0x3424;
            shr.u32 rest, pair, 4;
            and.b32 rest, rest, 0x07F007F0;
            and.b32 pair, pair, minus;
            or.b32 pair, pair, rest;
            fma.rn.bf16x2 $1, pair, large, minus;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        numbers = codes.to(kind)
    return numbers

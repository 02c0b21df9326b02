"""The ops that models are made of, one folder each: reference, Triton, and vendor versions."""

from reprise.ops.apply_penalties import apply_penalties
from reprise.ops.argmax import argmax
from reprise.ops.checksum import checksum
from reprise.ops.linear import linear, linear_add, linear_into, norm_gated_linear, norm_linear
from reprise.ops.paged_attention import paged_attention
from reprise.ops.registry import Op, OpTable, all_ops, find, needs_triton, op, runs_anywhere
from reprise.ops.rms_norm import rms_norm
from reprise.ops.rotary_cache import rotary_cache
from reprise.ops.sample import sample
from reprise.ops.silu_and_mul import silu_and_mul

__all__ = [
    "Op",
    "OpTable",
    "all_ops",
    "apply_penalties",
    "argmax",
    "checksum",
    "find",
    "linear",
    "linear_add",
    "linear_into",
    "needs_triton",
    "norm_gated_linear",
    "norm_linear",
    "op",
    "paged_attention",
    "rms_norm",
    "rotary_cache",
    "runs_anywhere",
    "sample",
    "silu_and_mul",
]

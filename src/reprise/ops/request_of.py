# mypy: allow-untyped-defs, no-check-untyped-defs
"""Whose a token is, for kernels that have programs for tokens."""

import triton
import triton.language as tl

from reprise.ops.triton_util import next_power_of_2


def block_of(requests: int) -> int:
    """BLOCK_R for so many requests: not another kernel for each few more."""
    return max(64, next_power_of_2(requests))


@triton.jit
def request_of(token, seq_lens_ptr, starts_ptr, requests, BLOCK_R: tl.constexpr):
    """The request of a token, and the token's position; -1: it has none, or is padding.

    Args:
        seq_lens_ptr: [requests] int32, tokens of each request, the new ones included.
        starts_ptr: [requests + 1] int32, where their new tokens begin, ascending.
    """
    number = tl.arange(0, BLOCK_R)
    ends = tl.load(starts_ptr + 1 + number, mask=number < requests, other=0)
    request = tl.sum(((number < requests) & (ends <= token)).to(tl.int32), axis=0)
    inside = request < requests
    request = tl.where(inside, request, 0)
    length = tl.load(seq_lens_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    return request, tl.where(inside & (length > 0), length - (end - token), -1)

"""The gated delta rule on a host such that the bits of a token depend on its request's tokens
alone: token by token, wherever a step ends, and sums of one order, whatever is computed beside."""

from __future__ import annotations

import functools

from torch import Tensor

from reprise.ops.gated_delta import chunked


def _carried_on(now: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    now = now * decay.exp()[..., None, None]
    error = value - _read(now, key)
    # Product and sum apart: torch rounds once or twice if it is told to compute both.
    return now + (beta.unsqueeze(-1) * error).unsqueeze(-1) * key.unsqueeze(-2)


def _read(now: Tensor, query: Tensor) -> Tensor:
    return (now * query.unsqueeze(-2)).sum(-1)


gated_delta = functools.partial(
    chunked.gated_delta, rule=chunked.Rule(_carried_on, _read, chunks=False)
)

"""The tensors of one step, as layers read them: the one argument of a layer beside activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Where the step's requests keep the cache rows of one lifetime."""

    blocks: Tensor
    """[R, M] int32: the cache blocks of each request, in the order of its tokens."""
    slots: Tensor
    """[T] int64: where each token's rows go; padding goes to the null block."""


@dataclass(frozen=True)
class Batch:
    """Which tokens of which requests a step computes. All tensors are views of static memory.

    The memory keeps its addresses from step to step and is refreshed in place, so a graph that
    captured these views reads the current step's values when it replays. A layer reads all of
    it on the device. What a new kind of layer needs to know of a step or of its requests is one
    more field here, never one more argument.

    Of the cache rows that its requests read a step writes those of its own tokens and no others:
    what one of them reads that is older, none of them writes, nor padding. So whatever a kernel
    reads of a request's older tokens was there before the step began.
    """

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: how many tokens each token's request has before it."""
    rows: Tensor
    """[R] int64: each request's row, its place on the device as long as it runs; 0, which belongs
    to no request, for padding."""
    query_start_loc: Tensor
    """[R + 1] int32: request r owns tokens query_start_loc[r] to query_start_loc[r + 1]."""
    seq_lens: Tensor
    """[R] int32: tokens of each request, this step's included; 0 marks padding."""
    accepted: Tensor
    """[R] int32: of the tokens that the request's last step drafted and the one before them, how
    many count; 0: that step computed known tokens, all of which count."""
    known: Tensor
    """[R] int32: new tokens of each request that are known, and all count; 0: it computes its
    newest token and what is drafted behind that. However many these are: a prompt's chunk may be as
    long. 0 for padding."""
    fresh: Tensor
    """[R] bool: nothing of the request is computed yet; true for padding."""
    tables: tuple[Table, ...]
    """One for each lifetime of the model's caches."""
    query_len: int
    """New tokens of every request in a decode step, 0 in a mixed one."""
    prompt: int = 0
    """New tokens of the one request, if they are its first ones; 0: that is not known."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step belong. All tensors are views of static step buffers.

    The buffers keep their addresses from step to step and are refreshed in place, so a graph
    that captured these views reads the current step's values when it replays.
    """

    query_start_loc: Tensor
    """[R + 1] int32: request r owns rows query_start_loc[r] to query_start_loc[r + 1]."""
    seq_lens: Tensor
    """[R] int32: tokens of each request, this step's included; 0 marks padding."""
    block_tables: Tensor
    """[R, M] int32: the cache blocks of each request."""
    slot_mapping: Tensor
    """[T] int64: where each token's key and value go; padding goes to the null block."""
    query_len: int
    """New tokens of every request in a decode step, 0 in a mixed one."""

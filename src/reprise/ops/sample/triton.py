"""Sampling in Triton, without a sort.

``group_kernel`` reads the logits once, with many programs a row, and keeps the maximum and the
mass of each group of neighbouring tokens. ``draw_kernel``, one program a row, works from these:
a greedy row needs one group's logits, an unfiltered row too, and a filtered row the few groups
whose maximum says that they may hold a kept token (``threshold.py``).
"""

import torch
from torch import Tensor

from reprise.ops.sample.draw_kernel import draw_kernel
from reprise.ops.sample.group_kernel import group_kernel
from reprise.ops.triton_util import cdiv, launch, next_power_of_2

_GROUPS_PER_PROGRAM = 32
_MOST_GROUPS = 2048
_CAPACITY = 16384
"""Tokens that may be kept as far as the groups tell; with more, the whole row is searched."""
_BLOCK = 1024
"""Tokens of one step of a search."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Arguments as in the reference; rows of ``logits`` may be strided."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    group = max(128, next_power_of_2(cdiv(vocab, _MOST_GROUPS)))
    groups = cdiv(vocab, group)
    maxima = logits.new_empty((rows, groups), dtype=torch.float32)
    masses = logits.new_empty((rows, groups), dtype=torch.float32)
    chosen_groups = logits.new_empty((rows, groups), dtype=torch.int32)
    capacity = min(_CAPACITY, groups * group)
    candidates = logits.new_empty((rows, capacity), dtype=torch.float32)
    candidate_ids = logits.new_empty((rows, capacity), dtype=torch.int32)
    out = logits.new_empty((rows,), dtype=torch.int64)
    programs = cdiv(groups, _GROUPS_PER_PROGRAM)
    launch(group_kernel, (rows * programs,))(
        logits,
        temperature,
        maxima,
        masses,
        logits.stride(0),
        VOCAB=vocab,
        GROUP=group,
        GROUPS=groups,
        GROUPS_PER_PROGRAM=_GROUPS_PER_PROGRAM,
        num_warps=8,
    )
    launch(draw_kernel, (rows,))(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        maxima,
        masses,
        chosen_groups,
        candidates,
        candidate_ids,
        out,
        logits.stride(0),
        VOCAB=vocab,
        GROUP=group,
        GROUPS=groups,
        GROUPS_PER_STEP=max(1, 4096 // group),
        BLOCK_G=next_power_of_2(groups),
        CAPACITY=capacity,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return out

"""Log probabilities on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LogprobTensors:
    """For each row: the chosen token first, then the most likely ones.

    ``token_ids`` [R, 1 + n] int64, ``logprobs`` [R, 1 + n] float32, ``ranks`` [R] int64 (of the
    chosen token, 1 is the likeliest). ``whole`` [W, V] float32: all log probabilities of the rows
    that want the whole vocabulary, in their order.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    whole: Tensor | None = None


def top_logprobs(
    logits: Tensor, chosen: Tensor, count: int, whole: Tensor | None = None
) -> LogprobTensors:
    """Log probabilities of ``chosen`` [R] and of the ``count`` likeliest tokens.

    Args:
        logits: [R, V] float32, as the model gave them.
        chosen: [R] int64.
        count: Likeliest tokens to list beside the chosen one.
        whole: [W] int64, rows whose whole vocabulary is wanted.
    """
    logprobs = logits.log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, chosen.unsqueeze(1))
    ranks = (logprobs > of_chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    return LogprobTensors(
        torch.cat((chosen.unsqueeze(1), ids), dim=1),
        torch.cat((of_chosen, values), dim=1),
        ranks,
        None if whole is None else logprobs.index_select(0, whole),
    )

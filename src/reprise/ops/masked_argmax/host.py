"""The choice on a host's memory, a row at a time."""

import numpy as np
import torch
from torch import Tensor

from reprise.ops.apply_bitmask.host import allowed


def masked_argmax(logits: Tensor, which: Tensor, bits: Tensor, peaks: Tensor) -> Tensor:
    """Arguments as in the reference."""
    words, vocab = bits.numpy(), logits.shape[1]
    peaks.copy_(logits.amax(dim=-1))
    tokens = np.empty(len(logits), dtype=np.int64)
    for number, (row, mask) in enumerate(zip(logits, which.tolist(), strict=True)):
        values = row.float().numpy()
        if mask >= 0:
            values = np.where(allowed(words[mask], vocab), values, np.float32(-np.inf))
        tokens[number] = values.argmax()
    return torch.from_numpy(tokens)

"""Masks on a host's memory, a row at a time: a byte for each token, and not eight as a reference
for all devices has."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def apply_bitmask(logits: Tensor, which: Tensor, bits: Tensor) -> Tensor:
    """Arguments as in the reference."""
    out = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    values, vocab = out.numpy(), logits.shape[1]
    masks = bits.numpy()
    for row, mask in enumerate(which.tolist()):
        if mask >= 0:
            np.putmask(values[row], ~allowed(masks[mask], vocab), -np.inf)
    return out


def allowed(words: np.ndarray[Any, Any], vocab: int) -> np.ndarray[Any, Any]:
    """[V] bool: whether each token's bit is set in ``words`` [ceil(V / 32)] int32."""
    lowest_first = np.ascontiguousarray(words).astype("<i4", copy=False)
    return np.unpackbits(lowest_first.view(np.uint8), count=vocab, bitorder="little").view(np.bool_)

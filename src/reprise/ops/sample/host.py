"""The draw on a host's memory, where its arguments can be looked at: what no row asks for is left
out. The tokens are the reference's."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise.ops.sample.reference import inverted, kept, philox

_FEW = 12
"""So many draws are computed one by one: a call of numpy takes as long as a dozen of Python's."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Arguments as in the reference."""
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1))  # of equal ones the first
    drawing = np.flatnonzero(temperature.numpy())
    if not len(drawing):
        return tokens
    filters, draws = (top_k, top_p, min_p), (seeds, positions)
    if len(drawing) == len(tokens):
        tokens.copy_(_drawn(logits, temperature, filters, draws))
        return tokens
    rows = torch.from_numpy(drawing)
    tokens[rows] = _drawn(
        logits[rows], temperature[rows], [each[rows] for each in filters],
        [each[rows] for each in draws],
    )  # fmt: skip
    return tokens


def _drawn(
    logits: Tensor, temperature: Tensor, filters: Sequence[Tensor], draws: Sequence[Tensor]
) -> Tensor:
    """Of rows that all draw."""
    top_k, top_p, min_p = filters
    scaled = logits / temperature.unsqueeze(1)
    some = top_k.numpy().any() or (top_p.numpy() < 1).any() or min_p.numpy().any()
    mask = kept(scaled, top_k, top_p, min_p) if some else None
    return inverted(scaled, mask, _uniform(*draws))


def _uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """As the reference's."""
    if len(seeds) > _FEW:
        words = philox(seeds.numpy(), positions.numpy())
    else:
        pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
        words = np.array([philox(*each) for each in pairs])
    return torch.from_numpy((words >> 8).astype(np.float32) * np.float32(2.0**-24))

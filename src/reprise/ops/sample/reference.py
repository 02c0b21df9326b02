import math
from typing import Any

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draw one token a row; the draw depends on the row's logits, seed and position alone.

    Tokens are kept by thresholds, so that ties are kept or dropped together: first the
    ``top_k`` largest logits; of their renormalised distribution the most likely tokens up to the
    first at which their mass reaches ``top_p`` (Holtzman et al. 2020); and of these the tokens at
    least ``min_p`` times as likely as the likeliest (Nguyen et al. 2024). The draw inverts the
    cumulative distribution in vocabulary order at a Philox-4x32-10 uniform (Salmon et al. 2011)
    with key ``seeds`` and counter ``positions``.

    Args:
        logits: [R, V] float32.
        temperature: [R] float32; 0 takes the largest logit, of equal ones the lowest token id.
        top_k: [R] int32; V or more, or 0: all.
        top_p: [R] float32 in (0, 1]; 1: all.
        min_p: [R] float32 in [0, 1]; 0: all.
        seeds: [R] int64.
        positions: [R] int64, number of tokens that the request has generated so far.

    Returns:
        [R] int64 token ids.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    drawn = inverted(scaled, kept(scaled, top_k, top_p, min_p), uniform(seeds, positions))
    best = (logits == logits.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
    return torch.where(greedy, best, drawn)


def kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[R, V] bool: the tokens that may be drawn."""
    vocab = scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values
    count = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).long().unsqueeze(1)
    kth = ordered.gather(1, count - 1)
    # Ties with the k-th are kept, so the top-p mass is taken over all of them.
    probabilities = ordered.masked_fill(ordered < kth, -math.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    in_nucleus = (before < top_p.unsqueeze(1)) & (ordered >= kth)
    in_nucleus |= (top_p >= 1).unsqueeze(1) & (ordered >= kth)
    in_nucleus[:, 0] = True
    threshold = ordered.masked_fill(~in_nucleus, math.inf).amin(dim=-1, keepdim=True)
    floor = torch.where(min_p > 0, min_p.log(), -math.inf).unsqueeze(1) + ordered[:, :1]
    return (scaled >= threshold) & (scaled >= floor)


def inverted(scaled: Tensor, kept: Tensor | None, chance: Tensor) -> Tensor:
    """[R] int64: where the cumulative distribution of the kept tokens, or of all, reaches
    ``chance`` [R]."""
    weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
    if kept is not None:
        weights = weights.masked_fill(~kept, 0.0)
    cumulative = weights.double().cumsum(dim=-1)
    target = chance.double().unsqueeze(1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return found.clamp(max=scaled.shape[1] - 1)


def fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """[R] float32 in [0, 1): the first word of Philox-4x32-10, its top 24 bits as a fraction."""
    return (philox(seeds, positions) >> 8).float() * 2.0**-24


def philox(seed: Any, position: Any) -> Any:
    """The first word of Philox-4x32-10: of whole numbers, or of each of a tensor's or an array's,
    of int64."""
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1 = position & _MASK32, (position >> 32) & _MASK32
    c2 = c3 = c0 & 0
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0


def _multiply(a: Any, b: int) -> tuple[Any, Any]:
    """High and low 32 bits of the product of 32-bit words held in int64, without overflow."""
    low_half = (a & 0xFFFF) * b
    high_half = (a >> 16) * b + (low_half >> 16)
    return (high_half >> 16) & _MASK32, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)

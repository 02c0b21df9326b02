import torch
from torch import Tensor

from reprise.ops.latent_rows import store
from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.rotary_tail.reference import rotated


def reference(
    projected: Tensor,
    bias: Tensor,
    state: Tensor,
    state_slots: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    gain: Tensor,
    norm_eps: float,
    cos_sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    tail: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Compress each r tokens of a request to one row, as in DeepSeek-V4.

    First every token leaves its values and gates in ``state``, where its position finds them: so it
    makes no difference which steps the tokens of a row were computed in, nor whether some of them
    are computed again. Then each token whose position p is the last of r, ``(p + 1) % r == 0``,
    makes row ``p // r``: of every channel the sum of the r values up to p, weighted with the
    softmax of their gates. Where ``bias`` is twice as wide as a row, rows overlap: there are 2 r
    values, the first half of the channels of the r tokens before and the second half of these.
    Before a request's first token there is nothing. The row is normalised, rotated by the position
    of the first of its r tokens (:func:`reprise.ops.rotary_tail`), and stored.

    Sums and softmax are float32; what is rounded to the cache's dtype is the sum, then the
    normalised row, then the rotated one. Tokens whose slot is in block 0 make no row.

    Args:
        projected: [T, 2 * C] float32, rows may be strided: values, then gates. C is D, or 2 D where
            rows overlap.
        bias: [r, C] float32, added to the gates of tokens by their position modulo r.
        state: [N, B, 2 * C] float32, written at ``state_slots``: values, then gates with the bias.
        state_slots: [T] int64. Tokens of block 0, which is no request's, may share one: which of
            them it holds then is open.
        block_tables: [R, M] int32, the blocks of each request's states.
        positions: [T] int64.
        query_start_loc: [R + 1] int32, ascending.
        seq_lens: [R] int32, tokens of each request, the new ones included; 0: padding.
        gain: [D], of the norm, as ``rms_norm`` takes it.
        norm_eps: Of the norm.
        cos_sin: [P, R] float32.
        cache: [N', B' / r, D] of blocks of B' tokens; the rows are written. Or codes: [N', B' / r,
            G, (D - R) / G] of the channels that do not rotate, or [N', B' / r, D] of all.
        slots: [T] int64, block * B' + offset in blocks of B' tokens.
        tail: [N', B' / r, R], the channels that rotate, if not all have codes.
        scales: [N', G, B' / r] float32 of the codes, or [N', B' / r]
            (:mod:`reprise.ops.latent_rows`).
    """
    every, channels = bias.shape
    size = len(gain)
    # Codes without numbers beside them are of what was not rounded before.
    numbers = cache.dtype if scales is None else torch.float32 if tail is None else tail.dtype
    values, gates = projected.float().split(channels, dim=1)
    rows = torch.cat((values, gates + bias[positions % every]), dim=1).to(state.dtype)
    block = state.shape[1]
    state[state_slots // block, state_slots % block] = rows

    request, entry, real = finished(query_start_loc, seq_lens, len(positions), every)
    span = every * (channels // size)
    steps = torch.arange(span, device=positions.device)
    places = ((entry + 1) * every - span).unsqueeze(1) + steps
    before = (places < 0).unsqueeze(2)
    places = places.clamp(min=0)
    last = block_tables.shape[1] - 1
    blocks = block_tables[request.unsqueeze(1), (places // block).clamp(max=last)].long()
    left = state[blocks, places % block].float()
    values, gates = left.split(channels, dim=2)
    if span > every:
        values, gates = _halves(values, size, every), _halves(gates, size, every)
    weights = gates.masked_fill(before, -torch.inf).softmax(dim=1)
    total = (weights * values.masked_fill(before, 0.0)).sum(dim=1).to(numbers)
    made = rms_norm(total, gain, norm_eps).float()
    limit = len(cos_sin) - 1
    made = rotated(made, cos_sin[(entry * every).clamp(max=limit)]).to(numbers)

    lengths = (query_start_loc[1:] - query_start_loc[:-1]).long()
    begins = seq_lens.long() - lengths
    token = query_start_loc.long()[request] + (entry + 1) * every - 1 - begins[request]
    slot = slots[torch.where(real, token, 0).clamp(0, max(len(slots) - 1, 0))]
    real = real & (slot >= cache.shape[1] * every)
    target = torch.where(real, slot // every, 0)
    where = target // cache.shape[1], target % cache.shape[1]
    store(made, *where, cache, tail, scales, real)


def finished(
    query_start_loc: Tensor, seq_lens: Tensor, tokens: int, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that a step's tokens are the last ones of.

    Args:
        query_start_loc: [R + 1].
        seq_lens: [R].
        tokens: Of the step.
        every: Tokens of a row.

    Returns:
        Of each of at most ``tokens // every + R`` rows its request and its number, and whether
        there is one.
    """
    lengths = (query_start_loc[1:] - query_start_loc[:-1]).long()
    ends = seq_lens.long()
    first = (ends - lengths).clamp(min=0) // every
    counts = torch.where(ends > 0, ends // every - first, 0)
    behind = counts.cumsum(0)
    number = torch.arange(tokens // every + len(seq_lens), device=seq_lens.device)
    request = torch.searchsorted(behind, number, right=True).clamp(max=len(seq_lens) - 1)
    real = number < behind[-1]
    entry = first[request] + number - (behind - counts)[request]
    return request, torch.where(real, entry, 0), real


def _halves(rows: Tensor, size: int, every: int) -> Tensor:
    """Of [E, 2 r, 2 D] the first channels of the first r, and the last of the last r."""
    return torch.cat((rows[:, :every, :size], rows[:, every:, size:]), dim=1)

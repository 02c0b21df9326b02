import torch
from torch import Tensor

from reprise.ops.lanes import silu


def reference(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    fresh: Tensor,
    out: Tensor,
    query_len: int,
    accepted: Tensor | None = None,
    known: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """A short causal convolution of each channel over each request's tokens, then SiLU.

    ``out[t] = silu(sum_j weight[:, j] * x[t - W + 1 + j])``: the last tap is the token's own. What
    comes before the request's tokens of this step is in its state, the inputs of the W - 1 tokens
    before them; before its first token there are zeros. The state becomes the inputs of its last
    W - 1 tokens. The sum and SiLU are float32 and rounded once.

    Where K tokens are drafted behind a request's newest one, a state is longer by K inputs. Which
    of a verifying request's tokens count is known when its next step begins: so its state keeps the
    inputs of all of them behind those of the W - 2 tokens before them, and its next step finds what
    comes before it ``accepted - 1`` inputs further on. A request whose tokens are all known leaves
    its last W - 1 inputs in front, and zeros behind them.

    Request r owns rows ``query_start_loc[r]`` to ``query_start_loc[r+1]`` of ``x``. A request with
    ``seq_lens[r] == 0`` is padding: its slot is neither read nor written. Rows of padding, and rows
    behind the last request, become zero.

    Args:
        x: [T, D], rows may be strided.
        weight: [D, W].
        state: [S, W - 1 + K, D], of each slot the inputs of its request's last tokens, newest
            last.
        slots: [R] int32, each request's; may be strided.
        query_start_loc: [R + 1] int32, ascending.
        seq_lens: [R] int32, tokens of each request, the new ones included.
        fresh: [R] bool: nothing comes before the request's new tokens, whatever its slot holds.
        out: [T, D], written in every row.
        query_len: New tokens of every request if they all have the same number (decode phase),
            else 0. A hint for the choice of kernel; fixed per graph.
        accepted: [R] int32, see :class:`reprise.cache.Batch`; given where K is not 0, as the next
            two are.
        known: [R] int32: 0 of a request that verifies drafts, which has at most 1 + K new tokens.
        places: [T] int64: 0 of tokens that are not read, such as drafts beyond a request's end;
            their inputs are kept as zeros.
    """
    tokens, taps = len(x), weight.shape[1]
    request, live = requests_of(tokens, query_start_loc, seq_lens)
    owners = slots.long()
    kept = state[owners]
    before = kept.float()
    steps = torch.arange(state.shape[1], device=x.device)
    if accepted is not None:
        first = (accepted.long() - 1).clamp(min=0)
        found = (first.unsqueeze(1) + steps[: taps - 1]).unsqueeze(2)
        before = before.gather(1, found.expand(-1, -1, x.shape[1]))
    before = torch.where(fresh.view(-1, 1, 1), 0.0, before)
    # Of every request the state, then of all the new tokens: where each tap finds its input.
    inputs = torch.cat((before.flatten(0, 1), x.float()))
    since = torch.arange(tokens, device=x.device) - query_start_loc.long()[request]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for tap in range(taps):
        found = _places(request, since - (taps - 1 - tap), query_start_loc, taps - 1)
        total += weight[:, tap].float() * inputs[found]
    out.copy_(torch.where(live.unsqueeze(1), silu(total), 0.0))

    rows = torch.arange(len(slots), device=x.device).unsqueeze(1)
    lengths = (query_start_loc[1:] - query_start_loc[:-1]).long().unsqueeze(1)
    # Of each input that is kept, its token's number among the request's new ones.
    since = lengths - (taps - 1) + steps
    counts = (steps < taps - 1).expand_as(since)
    if known is not None and places is not None:
        verifies = (known == 0).unsqueeze(1)
        since = torch.where(verifies, steps - (taps - 2), since)
        place = (query_start_loc[:-1].long().unsqueeze(1) + since).clamp(0, max(tokens - 1, 0))
        there = (since < 0) | ((since < lengths) & (places[place] != 0))
        counts = torch.where(verifies, there, counts)
        since = torch.minimum(since, lengths - 1)
    window = inputs[_places(rows, since, query_start_loc, taps - 1)]
    window = torch.where(counts.unsqueeze(2), window, 0.0).to(state.dtype)
    # Padding has a slot that is no request's, and may have it several times.
    idle = (seq_lens == 0).view(-1, 1, 1)
    state.index_copy_(0, owners, torch.where(idle, kept, window))


def requests_of(tokens: int, query_start_loc: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of ``tokens`` rows the request [T] int64, any for padding; and whether it has one."""
    place = torch.arange(tokens, device=query_start_loc.device, dtype=query_start_loc.dtype)
    ends = query_start_loc[1:].contiguous()
    request = torch.searchsorted(ends, place, right=True).clamp(max=len(seq_lens) - 1)
    return request, (place < query_start_loc[-1]) & (seq_lens[request] > 0)


def _places(request: Tensor, since: Tensor, query_start_loc: Tensor, width: int) -> Tensor:
    """Where the input of a request's token ``since`` lies, counted from its first new one, in the
    states of all requests, ``width`` rows each, with all tokens behind them."""
    old = request * width + width + since
    new = (len(query_start_loc) - 1) * width + query_start_loc.long()[request] + since
    return torch.where(since < 0, old.clamp(min=0), new.clamp(min=0))

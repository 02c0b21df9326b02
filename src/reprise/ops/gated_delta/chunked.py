"""The gated delta rule in torch: all decodes of a step at once, prompts chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reprise.ops.gated_delta.reference import prepared

CHUNK = 64
"""Tokens whose updates are solved for together."""


def gated_delta(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    fresh: Tensor,
    out: Tensor,
    query_len: int,
) -> None:
    """Shapes as in the reference; lengths are read on the host, but where each request has one new
    token."""
    inputs = prepared(qkv, a, b, a_log, dt_bias, state)
    if query_len == 1 and len(qkv) == len(slots):
        _decodes(inputs, state, slots, seq_lens, fresh, out)
        return
    out.zero_()
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    single: list[int] = []
    for row, length in enumerate(lengths):
        begin, end = starts[row], starts[row + 1]
        if length == 0 or begin == end:
            continue
        if end - begin == 1:
            single.append(row)
            continue
        slot = int(slots[row])
        before = torch.zeros_like(state[slot]) if bool(fresh[row]) else state[slot]
        answer, after = _chunks(before.float(), *(each[begin:end] for each in inputs))
        out[begin:end] = answer.to(out.dtype)
        state[slot] = after.to(state.dtype)
    if single:
        rows = torch.tensor(single, device=qkv.device)
        tokens = query_start_loc[rows].long()
        places = slots[rows].long()
        before = torch.where(fresh[rows].view(-1, 1, 1, 1), 0.0, state[places].float())
        answer, after = _one_token(before, *(each[tokens] for each in inputs))
        out[tokens] = answer.to(out.dtype)
        state[places] = after.to(state.dtype)


def _decodes(
    inputs: Sequence[Tensor], state: Tensor, slots: Tensor, seq_lens: Tensor, fresh: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """A token of each request; of padding, which has slot 0, the answer is 0."""
    places = slots.long()
    idle = (seq_lens == 0).view(-1, 1, 1)
    then = state[places]
    before = torch.where(fresh.view(-1, 1, 1, 1), 0.0, then.float())
    answer, after = _one_token(before, *inputs)
    out.copy_(torch.where(idle, 0.0, answer))
    state.index_copy_(0, places, torch.where(idle.unsqueeze(-1), then, after.to(state.dtype)))


def _one_token(
    now: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each of N requests: answers [N, HV, V] and states [N, HV, V, K]."""
    now = now * decay.exp()[..., None, None]
    error = value - torch.matmul(now, key.unsqueeze(-1)).squeeze(-1)
    now.addcmul_((beta.unsqueeze(-1) * error).unsqueeze(-1), key.unsqueeze(-2))
    return torch.matmul(now, query.unsqueeze(-1)).squeeze(-1), now


def _chunks(
    now: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """All tokens of a request: answers [n, HV, V] and its state [HV, V, K].

    Within a chunk the updates u solve a lower triangular system (the WY form; Yang et al. 2024,
    sec. 3.2, with decays as in Gated DeltaNet's eq. 12). Every exponent is at most 0: differences
    of summed decays are taken before they are raised, since no single one need be representable.
    """
    tokens = len(query)
    padding = -tokens % CHUNK

    def chunked(each: Tensor) -> Tensor:
        """[HV, chunks, CHUNK, ...]; tokens of padding decay nothing and write nothing."""
        padded = torch.cat((each, each.new_zeros(padding, *each.shape[1:])))
        return padded.view(-1, CHUNK, *each.shape[1:]).movedim(2, 0).contiguous()

    query, key, value, decay, beta = map(chunked, (query, key, value, decay, beta))
    # Of strong decays the sums are large, and what matters is how little some differ.
    exact = decay.double().cumsum(-1)
    sums = exact.float()
    gap = (exact.unsqueeze(-1) - exact.unsqueeze(-2)).float()
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).tril()
    ratio = gap.masked_fill(~causal, float("-inf")).exp()
    lower = (beta.unsqueeze(-1) * (key @ key.mT) * ratio).tril(-1)
    weighted = torch.cat((value, sums.exp().unsqueeze(-1) * key), dim=-1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(lower, weighted, upper=False, unitriangular=True)
    own, of_state = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    seen = (query @ key.mT) * ratio
    from_state = query * sums.exp().unsqueeze(-1)
    last = sums[..., -1:]
    kept = key * (exact[..., -1:] - exact).float().exp().unsqueeze(-1)
    answers = torch.empty_like(value)
    for chunk in range(query.shape[1]):
        update = own[:, chunk] - of_state[:, chunk] @ now.mT
        answers[:, chunk] = from_state[:, chunk] @ now.mT + seen[:, chunk] @ update
        now = now * last[:, chunk].exp().unsqueeze(-1) + update.mT @ kept[:, chunk]
    return answers.movedim(0, 2).flatten(0, 1)[:tokens], now

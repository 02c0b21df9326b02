"""The gated delta rule in torch: all decodes of a step at once, prompts chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reprise.ops.gated_delta.reference import keys_and_values, prepared

CHUNK = 64
"""Tokens whose updates are solved for together."""
_ALL = slice(None)


class Rule(NamedTuple):
    """How the delta rule is computed."""

    carried_on: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """States [N, HV, V, K] of N requests behind one token more of each, from key [N, HV, K], value
    [N, HV, V], decay and beta [N, HV]. It may overwrite what it was given."""
    read: Callable[[Tensor, Tensor], Tensor]
    """What queries [N, HV, K] find in such states: [N, HV, V]."""
    chunks: bool
    """Prompts are solved for chunk by chunk, not token by token."""


def _carried_on(now: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    now = now * decay.exp()[..., None, None]
    error = value - _read(now, key)
    return now.addcmul_((beta.unsqueeze(-1) * error).unsqueeze(-1), key.unsqueeze(-2))


def _read(now: Tensor, query: Tensor) -> Tensor:
    return torch.matmul(now, query.unsqueeze(-1)).squeeze(-1)


_CHUNKS = Rule(_carried_on, _read, chunks=True)


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
    recent: Tensor | None = None,
    gates: Tensor | None = None,
    accepted: Tensor | None = None,
    known: Tensor | None = None,
    places: Tensor | None = None,
    rule: Rule = _CHUNKS,
) -> None:
    """Shapes as in the reference; lengths are read on the host, but where all requests have the
    same number of new tokens."""
    inputs = prepared(qkv, a, b, a_log, dt_bias, state)
    drafts: _Drafts | None = None
    if recent is not None:
        assert gates is not None
        assert accepted is not None
        assert known is not None
        assert places is not None
        counts = torch.where(fresh, 0, accepted)
        drafts = _Drafts(recent, gates, qkv[:, -recent.shape[2] :], counts, known, places, rule)
    step = _Step(inputs, state, slots, seq_lens, fresh, out, drafts, rule)
    if query_len and len(qkv) == query_len * len(slots):
        step.together(query_len)
        return
    out.zero_()
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    verifies = [False] * len(lengths) if known is None else (known == 0).tolist()
    short: dict[int, list[int]] = {}
    """Requests by how many tokens they have, if they are computed token by token."""
    for row, length in enumerate(lengths):
        begin, end = starts[row], starts[row + 1]
        if length == 0 or begin == end:
            continue
        if not rule.chunks or end - begin == 1 or (drafts is not None and verifies[row]):
            short.setdefault(end - begin, []).append(row)
            continue
        slot = slots[row : row + 1].long()
        now = torch.where(fresh[row], 0.0, state[slot].float())
        if drafts is not None:
            now = drafts.committed(now, slot, counts[row : row + 1])
            drafts.clear(slot)
        answer, after = _chunks(now[0], *(each[begin:end] for each in inputs))
        out[begin:end] = answer.to(out.dtype)
        state[slot] = after.to(state.dtype)
    for count, some in short.items():
        rows = torch.tensor(some, dtype=torch.int64, device=qkv.device)
        begins = query_start_loc[rows].long().unsqueeze(1)
        step.together(count, rows, begins + torch.arange(count, device=qkv.device))


def _of(tokens: Tensor | int, each: Tensor) -> Tensor:
    """[N, n, ...]: of [T, ...] the tokens [N, n] of N requests; a number: all, so many of each."""
    return each.unflatten(0, (-1, tokens)) if isinstance(tokens, int) else each[tokens]


@dataclass(frozen=True)
class _Drafts:
    """What is kept of tokens of which it is not known yet which count; see the reference."""

    recent: Tensor
    gates: Tensor
    new: Tensor
    """[T, HK * K + HV * V]: the keys and values of this step."""
    accepted: Tensor
    known: Tensor
    places: Tensor
    rule: Rule

    def committed(self, now: Tensor, slots: Tensor, accepted: Tensor) -> Tensor:
        """States [N, HV, V, K] of these slots, carried over the tokens that count: [N] each.

        Tokens that do not count write nothing and decay nothing, so that the host need not know how
        many there are.
        """
        count = torch.arange(self.recent.shape[1], device=now.device) < accepted.unsqueeze(1)
        recent = torch.where(count.unsqueeze(2), self.recent[slots], 0.0)
        gates = torch.where(count[..., None, None], self.gates[slots], 0.0)
        key, value = keys_and_values(recent, *now.shape[1:])
        for token in range(recent.shape[1]):
            decay, beta = gates[:, token].unbind(1)
            now = self.rule.carried_on(now, key[:, token], value[:, token], decay, beta)
        return now

    def clear(self, slots: Tensor) -> None:
        self.recent[slots], self.gates[slots] = 0.0, 0.0

    def keep(
        self, slots: Tensor, idle: Tensor, verifies: Tensor, tokens: Tensor | int, gates: Tensor
    ) -> None:
        """Of N requests, which have these tokens (see :func:`_of`) with gates [N, n, 2, HV], keep
        what the next step may have to replay: nothing where all tokens are known."""
        live = verifies.view(-1, 1) & (_of(tokens, self.places) != 0)
        for whole, new in ((self.recent, _of(tokens, self.new)), (self.gates, gates)):
            there = live.view(*live.shape, *(1 for _ in whole.shape[2:]))
            kept = torch.zeros_like(whole[slots])
            kept[:, : live.shape[1]] = torch.where(there, new, 0.0)[:, : whole.shape[1]]
            nobody = idle.view(-1, *(1 for _ in whole.shape[1:]))
            whole.index_copy_(0, slots, torch.where(nobody, whole[slots], kept))


@dataclass(frozen=True)
class _Step:
    """The arguments of a call."""

    inputs: Sequence[Tensor]
    state: Tensor
    slots: Tensor
    seq_lens: Tensor
    fresh: Tensor
    out: Tensor
    drafts: _Drafts | None
    rule: Rule

    def together(
        self, count: int, rows: Tensor | slice = _ALL, tokens: Tensor | None = None
    ) -> None:
        """Requests ``rows`` [N] with ``count`` tokens each, [N, count], one after the other; of
        padding, which has slot 0, the answer is 0. Without both all requests with all tokens. Reads
        nothing on the host."""
        state, drafts = self.state, self.drafts
        which = count if tokens is None else tokens
        places = self.slots[rows].long()
        idle = (self.seq_lens[rows] == 0).view(-1, 1, 1, 1)
        then = state[places]
        now = torch.where(self.fresh[rows].view(-1, 1, 1, 1), 0.0, then.float())
        if drafts is not None:
            now = drafts.committed(now, places, drafts.accepted[rows])
        before = now
        query, *inputs = (_of(which, each) for each in self.inputs)
        for token in range(count):
            now = self.rule.carried_on(now, *(each[:, token] for each in inputs))
            answer = self.rule.read(now, query[:, token])
            place = slice(token, None, count) if tokens is None else tokens[:, token]
            self.out[place] = torch.where(idle[..., 0], 0.0, answer).to(self.out.dtype)
        if drafts is not None:
            verifies = (drafts.known[rows] == 0).view(-1, 1, 1, 1)
            now = torch.where(verifies, before, now)
            gates = torch.stack(inputs[2:], dim=2)
            drafts.keep(places, idle, verifies, which, gates)
        state.index_copy_(0, places, torch.where(idle, then, now.to(state.dtype)))


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

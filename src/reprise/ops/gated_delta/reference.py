import torch
from torch import Tensor

from reprise.ops.lanes import sigmoid, softplus

NORM_EPS = 1e-6
"""Added to a head's sum of squares."""


def reference(
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
) -> None:
    """The gated delta rule (Yang, Kautz & Hatamizadeh 2024, eq. 10) over each request's tokens.

    Of every value head a state S [V, K] is carried on from token to token, in float32::

        S <- exp(g) * S;  u = beta * (v - S k);  S <- S + u k^T;  o = S q

    with ``g = -exp(a_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``, float32. Queries and
    keys are divided by the root of their sum of squares plus 1e-6, queries also by the root of K.
    Value head h reads query and key head ``h // (HV // HK)``. A request begins with zeros if it is
    ``fresh``, whatever its slot holds, else with what the slot holds; the slot is left with the
    state behind its last token.

    Where K tokens are drafted behind a request's newest one, which of the tokens of a verifying
    request count is known when its next step begins. So its state is left as it was before them,
    and ``recent`` and ``gates`` with what the rule reads of them; the next step, whatever it
    computes, carries the state over the ``accepted`` ones before anything else reads it
    (:func:`commit_state`). A state is thus read and written once a step. A request whose tokens
    are all known leaves the state behind them, and zeros there.

    Request r owns rows ``query_start_loc[r]`` to ``query_start_loc[r+1]`` of the activations. A
    request with ``seq_lens[r] == 0`` is padding: its slot is neither read nor written. Rows of
    padding, and rows behind the last request, become zero.

    Args:
        qkv: [T, 2 * HK * K + HV * V]: queries, keys, values behind their convolution; rows may be
            strided.
        a: [T, HV], rows may be strided.
        b: [T, HV], rows may be strided.
        a_log: [HV] float32.
        dt_bias: [HV] float32.
        state: [S, HV, V, K].
        slots: [R] int32, each request's; may be strided.
        query_start_loc: [R + 1] int32, ascending.
        seq_lens: [R] int32, tokens of each request, the new ones included.
        fresh: [R] bool.
        out: [T, HV, V], written in every row.
        query_len: New tokens of every request if they all have the same number (decode phase),
            else 0. A hint for the choice of kernel; fixed per graph.
        recent: [S, 1 + K, HK * K + HV * V]: keys and values of each slot's last tokens, as they
            are in ``qkv``. None: nothing is drafted; else the next four are given, too.
        gates: [S, 1 + K, 2, HV] float32: the logarithms of their decays, and beta.
        accepted: [R] int32, see :class:`reprise.cache.Batch`.
        known: [R] int32: 0 of a request that verifies drafts, which has at most 1 + K new tokens.
        places: [T] int64: 0 of tokens that are not read, such as drafts beyond a request's end:
            what is kept of them are zeros.
    """
    query, key, value, decay, beta = prepared(qkv, a, b, a_log, dt_bias, state)
    out.zero_()
    starts = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if length == 0 or begin == end:
            continue
        slot = int(slots[row])
        now = torch.zeros_like(state[slot]) if bool(fresh[row]) else state[slot]
        now = now.float()
        # What is kept of the tokens of requests that verify drafts.
        kept: tuple[Tensor, Tensor] | None = None
        if recent is not None:
            assert gates is not None
            assert accepted is not None
            assert known is not None
            assert places is not None
            count = 0 if bool(fresh[row]) else int(accepted[row])
            now = commit_state(now, recent[slot, :count], gates[slot, :count])
            recent[slot], gates[slot] = 0, 0
            kept = (recent[slot], gates[slot]) if int(known[row]) == 0 else None
        before = now
        for token in range(begin, end):
            now = carried_on(now, key[token], value[token], decay[token], beta[token])
            out[token] = (now * query[token].unsqueeze(1)).sum(-1).to(out.dtype)
            if kept is not None and places is not None and int(places[token]):
                kept[0][token - begin] = qkv[token, -kept[0].shape[1] :]
                kept[1][token - begin] = torch.stack((decay[token], beta[token]))
        state[slot] = (now if kept is None else before).to(state.dtype)


def commit_state(now: Tensor, recent: Tensor, gates: Tensor) -> Tensor:
    """A state [HV, V, K] float32, carried over n tokens that a step has verified.

    Args:
        now: Before them.
        recent: [n, HK * K + HV * V].
        gates: [n, 2, HV] float32.
    """
    key, value = keys_and_values(recent, *now.shape)
    for token in range(len(recent)):
        now = carried_on(now, key[token], value[token], *gates[token])
    return now


def carried_on(now: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The state behind one token more."""
    now = now * decay.exp().view(-1, 1, 1)
    error = value - (now * key.unsqueeze(1)).sum(-1)
    return now + (beta.unsqueeze(-1) * error).unsqueeze(-1) * key.unsqueeze(1)


def keys_and_values(rows: Tensor, heads: int, value_size: int, key_size: int) -> tuple[Tensor, ...]:
    """Of rows [..., HK * K + HV * V] what the rule reads, float32: keys [..., HV, K], divided by
    their length, and values [..., HV, V]."""
    values = heads * value_size
    keys, rest = rows.float().split((rows.shape[-1] - values, values), dim=-1)
    keys = keys.unflatten(-1, (-1, key_size))
    keys = _normalised(keys).repeat_interleave(heads // keys.shape[-2], dim=-2)
    return keys, rest.unflatten(-1, (heads, value_size))


def _normalised(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + NORM_EPS)


def prepared(
    qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the rule reads of each token, in float32: query and key [T, HV, K], value [T, HV, V],
    logarithm of the decay and beta [T, HV]."""
    _, heads, value_size, key_size = state.shape
    queries = (qkv.shape[1] - heads * value_size) // 2
    query = _normalised(qkv[:, :queries].float().unflatten(-1, (-1, key_size)))
    query = (query * key_size**-0.5).repeat_interleave(heads // query.shape[1], dim=1)
    key, value = keys_and_values(qkv[:, queries:], heads, value_size, key_size)
    decay = -a_log.float().exp() * softplus(a.float() + dt_bias.float())
    return query, key, value, decay, sigmoid(b.float())

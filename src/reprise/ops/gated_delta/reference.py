import torch
import torch.nn.functional as F
from torch import Tensor

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
) -> None:
    """The gated delta rule (Yang, Kautz & Hatamizadeh 2024, eq. 10) over each request's tokens.

    Of every value head a state S [V, K] is carried on from token to token, in float32::

        S <- exp(g) * S;  u = beta * (v - S k);  S <- S + u k^T;  o = S q

    with ``g = -exp(a_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``, float32. Queries and
    keys are divided by the root of their sum of squares plus 1e-6, queries also by the root of K.
    Value head h reads query and key head ``h // (HV // HK)``. A request begins with zeros if it is
    ``fresh``, whatever its slot holds, else with what the slot holds; the slot is left with the
    state behind its last token.

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
        slots: [R] int32, each request's.
        query_start_loc: [R + 1] int32, ascending.
        seq_lens: [R] int32, tokens of each request, the new ones included.
        fresh: [R] bool.
        out: [T, HV, V], written in every row.
        query_len: New tokens of every request if they all have the same number (decode phase),
            else 0. A hint for the choice of kernel; fixed per graph.
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
        for token in range(begin, end):
            now = now * decay[token].exp().view(-1, 1, 1)
            error = value[token] - (now * key[token].unsqueeze(1)).sum(-1)
            update = beta[token].unsqueeze(-1) * error
            now = now + update.unsqueeze(-1) * key[token].unsqueeze(1)
            out[token] = (now * query[token].unsqueeze(1)).sum(-1).to(out.dtype)
        state[slot] = now.to(state.dtype)


def prepared(
    qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the rule reads of each token, in float32: query and key [T, HV, K], value [T, HV, V],
    logarithm of the decay and beta [T, HV]."""
    tokens = len(qkv)
    _, heads, value_size, key_size = state.shape
    rest = qkv.shape[1] - heads * value_size
    parts = qkv.float().split((rest // 2, rest // 2, heads * value_size), dim=1)
    query, key = (each.reshape(tokens, -1, key_size) for each in parts[:2])
    query, key = (
        each * torch.rsqrt(each.square().sum(-1, keepdim=True) + NORM_EPS) for each in (query, key)
    )
    group = heads // query.shape[1]
    query = (query * key_size**-0.5).repeat_interleave(group, dim=1)
    key = key.repeat_interleave(group, dim=1)
    decay = -a_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return query, key, parts[2].reshape(tokens, heads, value_size), decay, b.float().sigmoid()

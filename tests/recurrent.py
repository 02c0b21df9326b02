"""A toy hybrid: Llama in which every second layer, the first one too, keeps a state, not rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.cache import Batch, LayerCache, Rows, State
from reprise.layers import Build, Normed, Product, SelfAttention, tensor
from reprise.models import dense
from reprise.ops import registry
from reprise.ops.cases import Arguments, Cases, Maker

CHECKPOINT = 16
_declared: list[registry.Op] = []


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, slots: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, fresh: Tensor, out: Tensor, accepted: Tensor,
    known: Tensor, token_slots: Tensor,
) -> None:  # fmt: skip
    """The gated delta rule, token by token: an update that neither commutes nor is idempotent.

    Nothing is replayed: of a request that verifies drafts the state behind each token is kept, and
    its next step goes on from that of the last one that counts.

    query: [T, Hq, D]; key, value: [T, Hkv, D]; state: [S, 1 + K, Hkv, D, D] float32; slots: [R];
    out as query; token_slots: [T], 0 of tokens that nobody reads. Rows of requests without length
    stay as they are.
    """
    requests, heads, size = len(slots), key.shape[1], key.shape[2]
    places = slots.long()
    then = state[places]
    last = (accepted.long() - 1).clamp(min=0)
    now = then[torch.arange(requests, device=query.device), last]
    now = torch.where(fresh.view(-1, 1, 1, 1), 0.0, now)
    place = torch.arange(len(query), device=query.device, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1:].contiguous(), place, right=True)
    request = request.clamp(max=requests - 1)
    live = place < query_start_loc[-1]
    keys, values = F.normalize(key.float(), dim=-1), value.float()
    asked = query.float().view(len(query), heads, -1, size)
    # What a token makes of a state S: keeps @ S + adds.
    scaled = 0.6 * keys.unsqueeze(3)
    keeps = -scaled * keys.unsqueeze(2)
    keeps.diagonal(dim1=-2, dim2=-1).add_(0.95)
    adds = scaled * values.unsqueeze(2)
    behind = state.new_empty(len(query), heads, size, size)  # each token
    for token in range(len(query)):  # those behind the last live one are nobody's
        which = request[token : token + 1]
        old = now.index_select(0, which)[0]
        torch.baddbmm(adds[token], keeps[token], old, out=behind[token])
        now.index_copy_(0, which, behind[token : token + 1])
    out.copy_(torch.where(live.view(-1, 1, 1), (asked @ behind).view_as(query), 0.0))
    offset = torch.where(known[request] == 0, place - query_start_loc[request], 0).long()
    offset = offset.clamp(max=state.shape[1] - 1) + request * state.shape[1]
    counts = live & ((token_slots != 0) | (known[request] != 0))
    # Of several that go to one place the last one counts.
    newest = torch.full_like(state[places, :, 0, 0, 0], -1, dtype=torch.long).view(-1)
    newest.scatter_reduce_(0, offset, torch.where(counts, place.long(), -1), "amax")
    kept = behind[newest.clamp(min=0)].view_as(then)
    kept = torch.where((newest == -1).view(requests, -1, 1, 1, 1), 0.0, kept)
    state.index_copy_(0, places, torch.where((seq_lens == 0).view(-1, 1, 1, 1, 1), then, kept))


def _small(make: Maker) -> list[Arguments]:
    return [
        {
            "query": make.randn(3, 4, 8), "key": make.randn(3, 2, 8), "value": make.randn(3, 2, 8),
            "state": make.randn(4, 3, 2, 8, 8, dtype=torch.float32),
            "slots": make.ints([2, 1], torch.int32),
            "query_start_loc": make.ints([0, 1, 3], torch.int32),
            "seq_lens": make.ints([5, 2], torch.int32),
            "fresh": make.ints([0, 1]).bool(), "out": make.randn(3, 4, 8),
            "accepted": make.ints([3, 0], torch.int32), "known": make.ints([0, 2], torch.int32),
            "token_slots": make.ints([9, 9, 9]),
        }
    ]  # fmt: skip


def takes_back(build: Build) -> int:
    """Drafts, of which those that do not count leave no trace."""
    return build.num_drafts


class DeltaNet(SelfAttention):
    """Takes the weights of attention, without rotation."""

    def __init__(self, build: Build, *args: Any, **options: Any) -> None:
        super().__init__(build, *args, **options)
        shape = (1 + build.num_drafts, self.num_kv_heads, self.head_size, self.head_size)
        rows = {"state": Rows(shape, torch.float32)}
        self.cache = LayerCache(State(CHECKPOINT), takes_back(build), **rows)

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        heads, size = self.num_heads + 2 * self.num_kv_heads, self.head_size
        projected = self.qkv_proj(tensor(x)).view(-1, heads, size)
        query, key, value = projected.split(
            (self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1
        )
        out, table = torch.empty_like(query), batch.tables[self.cache.table]
        _declared[0](
            query, key, value, self.cache.tensors["state"], table.blocks, batch.query_start_loc,
            batch.seq_lens, batch.fresh, out, batch.accepted, batch.known, table.slots,
        )  # fmt: skip
        return Product(self.o_proj, out.flatten(1))


@contextmanager
def hybrids() -> Iterator[None]:
    """Dense models that are built in this block have such layers; ops know ``delta_rule``."""
    if not _declared:
        cases = Cases(_small, lambda make: [])
        _declared.append(
            registry.op("delta_rule", delta_rule, mutates=("state", "out"), cases=cases)
        )
    ops: Any = registry.all_ops()
    ops["delta_rule"] = _declared[0]

    def mixer(build: Build, *args: Any, **options: Any) -> SelfAttention:
        number = int(build.path.split(".")[2])
        return (SelfAttention if number % 2 else DeltaNet)(build, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "SelfAttention", mixer)
        try:
            yield
        finally:
            del ops["delta_rule"]

"""Linear attention by the gated delta rule (Yang, Kautz & Hatamizadeh 2024), as Qwen builds it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import STATE, Batch, LayerCache, Rows
from reprise.distributed import Share
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.lazy import Normed, Product, tensor
from reprise.layers.linear import Linear, Run, format_of


class GatedDeltaNet(nn.Module):
    """A short convolution, the gated delta rule over heads, a gated norm of what it gives.

    Of each request two things are kept, both its state: the inputs of the convolution at its last
    tokens, and a matrix for each value head; where tokens are drafted, also what the rule reads of
    the last step's tokens, so that those that count can be replayed.

    Args:
        build: How to make it.
        hidden_size: Width of the residual stream.
        key_heads: Heads of queries and keys (HK).
        value_heads: Heads of values (HV), a multiple.
        key_size: Channels of a query or key head (K).
        value_size: Channels of a value head (V).
        taps: Of the convolution.
        eps: Of the norm behind the rule.
        interleaved: The checkpoint stores the projections together, key head by key head.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        *,
        key_heads: int,
        value_heads: int,
        key_size: int,
        value_size: int,
        taps: int,
        eps: float,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.eps = build.path, eps
        every_value = value_heads * value_size
        # A key head and the value heads that go with it stay together.
        own = build.group.share(key_heads, "linear_num_key_heads")
        group = value_heads // key_heads
        self._heads = Share(*(each * group for each in own))
        keys = Share(*(each * key_size for each in own))
        values = Share(*(each * value_size for each in self._heads))
        self._channels = _side_by_side(keys, keys, values)
        if interleaved:
            sizes = (key_size, key_size, group * value_size, group * value_size)
            mixed = _ungrouped("in_proj_qkvz", own, sizes)
            gates = _ungrouped("in_proj_ba", own, (group, group))
        else:
            mixed = [Run("in_proj_qkv", *each) for each in self._channels]
            mixed.append(Run("in_proj_z", *values))
            gates = [Run(name, *self._heads) for name in ("in_proj_b", "in_proj_a")]
        key_heads, value_heads = own.size, self._heads.size
        self.value_heads, self.value_size = value_heads, value_size
        self.channels = 2 * keys.size + values.size
        self.gates: Linear | None = None
        if format_of(build, mixed) is format_of(build, gates):
            mixed = [*mixed, *gates]
        else:  # few outputs: quantised checkpoints leave them as they were
            self.gates = Linear(build, hidden_size, gates, split="out")
        self.in_proj = Linear(build, hidden_size, mixed, split="out")
        self.out_proj = Linear(build.at("out_proj"), every_value, hidden_size, split="in")

        def parameter(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.to(build.device), requires_grad=False)

        self.conv = parameter(torch.empty(self.channels, taps, dtype=build.dtype))
        # float32 whatever the rest is: small differences in them grow over a text.
        self.a_log = parameter(torch.zeros(value_heads, dtype=torch.float32))
        self.dt_bias = parameter(torch.ones(value_heads, dtype=torch.float32))
        self.norm = parameter(torch.ones(value_size, dtype=torch.float32))
        drafts = build.num_drafts
        rows = {
            "conv": Rows((taps - 1 + drafts, self.channels), build.dtype),
            # A head is a sum of keys times values: where a component of one nearly cancels, a row
            # or column of it does, while roundings are those of the other components.
            "heads": Rows((value_heads, value_size, key_size), torch.float32, together=2),
        }
        if drafts:
            kept = keys.size + values.size
            rows["recent"] = Rows((1 + drafts, kept), build.dtype)
            rows["gates"] = Rows((1 + drafts, 2, value_heads), torch.float32)
        self.cache = LayerCache(STATE, drafts, **rows)

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """See :func:`reprise.loading.destinations.destinations`."""
        begin = 0
        for each in self._channels:
            target = self.conv[begin : begin + each.size].unsqueeze(1)
            yield f"{self.path}.conv1d.weight", _part(target, each)
            begin += each.size
        yield f"{self.path}.A_log", _part(self.a_log, self._heads)
        yield f"{self.path}.dt_bias", _part(self.dt_bias, self._heads)
        yield f"{self.path}.norm.weight", Destination(self.norm)

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much."""
        if self.gates is None:
            projected = self.in_proj(x)
            gates = projected[:, -2 * self.value_heads :]
        else:
            x = tensor(x)
            projected, gates = self.in_proj(x), self.gates(x)
        values = self.value_heads * self.value_size
        before, z = projected[:, : self.channels], projected[:, self.channels :][:, :values]
        b, a = gates[:, : self.value_heads], gates[:, self.value_heads :]
        table, kept = batch.tables[self.cache.table], self.cache.tensors
        step = table.blocks, batch.query_start_loc, batch.seq_lens, batch.fresh
        recent: tuple[Tensor, ...] = ()
        drafts: tuple[Tensor, ...] = ()
        if self.cache.drafts:
            recent = kept["recent"], kept["gates"]
            drafts = batch.accepted, batch.known, table.slots
        qkv = projected.new_empty((len(projected), self.channels))
        ops.causal_conv(before, self.conv, kept["conv"], *step, qkv, batch.query_len, *drafts)
        out = projected.new_empty((len(projected), self.value_heads, self.value_size))
        ops.gated_delta(
            qkv, a, b, self.a_log, self.dt_bias, kept["heads"], *step, out, batch.query_len,
            *recent, *drafts,
        )  # fmt: skip
        return Product(self.out_proj, ops.gated_rms_norm(out, z, self.norm, self.eps))


def _side_by_side(*shares: Share) -> list[Share]:
    """Shares of things that are stored one behind the other, counted from where the first begins;
    what adjoins is one."""
    total, offset = sum(each.total for each in shares), 0
    found: list[Share] = []
    for each in shares:
        begin = offset + each.begin
        last = found[-1] if found else None
        if last is not None and last.begin + last.size == begin:
            found[-1] = Share(last.begin, last.size + each.size, total)
        else:
            found.append(Share(begin, each.size, total))
        offset += each.total
    return found


def _part(target: Tensor, share: Share) -> Destination:
    """Where a share of the stored rows goes."""
    if share.size == share.total:
        return Destination(target)
    part = (slice(share.begin, share.begin + share.size),)
    return Destination(target, part, (share.total, *target.shape[1:]))


def _ungrouped(name: str, groups: Share, sizes: tuple[int, ...]) -> list[Run]:
    """Of a projection that stores, group by group, parts of these sizes: the first part of all our
    groups, then the second, and so on."""
    width = sum(sizes)
    return [
        Run(name, group * width + sum(sizes[:part]), size, groups.total * width)
        for part, size in enumerate(sizes)
        for group in range(groups.begin, groups.begin + groups.size)
    ]

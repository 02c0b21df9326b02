"""DeepSeek-V4's attention: one head of keys that are values, a window, compressed rows behind it.

A query sees the last tokens one by one, and of what is further back rows that stand for some tokens
each: all rows, where one stands for many, or those that an indexer chooses.

Several ranks share out the groups of heads. What all heads read (keys, rows, what the indexer
chooses) each rank makes for itself: there is one head of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import KEPT, Batch, LayerCache, Rows, Window
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.hyper_connection import wide_norm
from reprise.layers.lazy import Normed, Product, tensor
from reprise.layers.linear import Linear, Run
from reprise.ops.latent_rows import group_size


@dataclass(frozen=True)
class AttentionSizes:
    """What all attention layers of a model have in common."""

    hidden_size: int
    heads: int
    head_size: int
    query_rank: int
    """Channels that queries are made of."""
    groups: int
    """Of heads, in the product behind attention."""
    output_rank: int
    """Channels of each group."""
    window: int
    eps: float
    """Of all norms."""
    index_heads: int
    index_size: int
    """Channels of an index head."""
    index_top: int
    """Rows that the indexer chooses."""


class Compressor(nn.Module):
    """Makes one cache row of some tokens: the gates' bias, the norm, and what is kept of tokens.

    Args:
        build: How to make it.
        size: Channels of a row.
        every: Tokens of a row.
        overlap: A row is made of as many tokens before, too.
        eps: Of the norm.
    """

    def __init__(self, build: Build, size: int, every: int, eps: float, *, overlap: bool) -> None:
        super().__init__()
        self.path, self.eps = build.path, eps
        self.channels = size * (2 if overlap else 1)
        bias = torch.zeros(every, self.channels, dtype=torch.float32, device=build.device)
        self.ape = nn.Parameter(bias, requires_grad=False)
        self.gain = nn.Parameter(
            torch.ones(size, dtype=torch.float32, device=build.device), requires_grad=False
        )

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """See :func:`reprise.loading.destinations.destinations`."""
        yield f"{self.path}.ape", Destination(self.ape)
        yield f"{self.path}.norm.weight", Destination(self.gain)

    @property
    def state(self) -> Rows:
        """Of a token: values and gates."""
        return Rows((2 * self.channels,), torch.float32)


class CompressedAttention(nn.Module):
    """See the module.

    Args:
        build: How to make it.
        sizes: Of the model.
        cos_sin: The layer's rotary table, [P, R]; the last R channels of a head rotate.
        every: Tokens of a compressed row; 0: there are none.
        overlap: See :class:`Compressor`. Of such rows an indexer chooses.
    """

    def __init__(
        self,
        build: Build,
        sizes: AttentionSizes,
        cos_sin: Tensor,
        *,
        every: int = 0,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.every, self.cos_sin = sizes, every, cos_sin
        self.path, head, hidden = build.path, sizes.head_size, sizes.hidden_size
        own = build.group.share(sizes.groups, "o_groups")
        each = sizes.heads // sizes.groups
        self.groups, self.heads = own.size, own.size * each
        self._own_heads = slice(own.begin * each, (own.begin + own.size) * each)
        self.down = Linear(build, hidden, {"wq_a": sizes.query_rank, "wkv": head})
        begin, all_heads = self._own_heads.start * head, sizes.heads * head
        queries = [Run("wq_b", begin, self.heads * head, all_heads)]
        if overlap:
            queries.append(Run("indexer.wq_b", 0, sizes.index_heads * sizes.index_size))
        self.up = Linear(build, sizes.query_rank, queries, split="out")
        self.q_norm = wide_norm(build.at("q_norm"), sizes.query_rank, sizes.eps)
        self.kv_norm = wide_norm(build.at("kv_norm"), head, sizes.eps)
        # As runs, so that no block of a format reaches from one group into the next.
        rank = sizes.output_rank
        runs = [
            Run("", number * rank, rank, sizes.groups * rank)
            for number in range(own.begin, own.begin + own.size)
        ]
        inputs = sizes.heads * head // sizes.groups
        self.wo_a = Linear(build.at("wo_a"), inputs, runs, split="out")
        self.wo_b = Linear(build.at("wo_b"), sizes.groups * sizes.output_rank, hidden, split="in")
        zeros = torch.zeros(self.heads, dtype=torch.float32, device=build.device)
        self.attn_sink = nn.Parameter(zeros, requires_grad=False)
        self.window = LayerCache(Window(sizes.window), **self._rows(build, "kv", head))
        self.compressor: Compressor | None = None
        self.indexer: Compressor | None = None
        if every:
            self._compress(build, every, overlap=overlap)

    def _compress(self, build: Build, every: int, *, overlap: bool) -> None:
        sizes = self.sizes
        here, eps = build.at("compressor"), sizes.eps
        self.compressor = Compressor(here, sizes.head_size, every, eps, overlap=overlap)
        width = self.compressor.channels
        parts = {"compressor.wkv": width, "compressor.wgate": width}
        states = {"state": self.compressor.state}
        rows = self._rows(build, "compressed", sizes.head_size, every)
        if overlap:
            here = build.at("indexer.compressor")
            self.indexer = Compressor(here, sizes.index_size, every, eps, overlap=True)
            width = self.indexer.channels
            parts |= {"indexer.compressor.wkv": width, "indexer.compressor.wgate": width}
            parts["indexer.weights_proj"] = sizes.index_heads
            states["index_state"] = self.indexer.state
            rows |= self._rows(build, "keys", sizes.index_size, every)
        self.gates = Linear(build, sizes.hidden_size, parts)
        self.states = LayerCache(Window(every * (2 if overlap else 1)), **states)
        self.kept = LayerCache(KEPT, **rows)

    def _rows(self, build: Build, name: str, size: int, every: int = 1) -> dict[str, Rows]:
        """What a cache keeps of rows of ``size`` channels. Codes have scales beside them, one for
        a row of the indexer's keys; the channels of others that rotate have none."""
        codes = build.cache_dtype
        if codes is None:
            return {name: Rows((size,), build.dtype, every)}
        shape: tuple[int, ...] = (size,)
        tail = {}
        if name != "keys":
            rotated = self.cos_sin.shape[1]
            each = group_size(size - rotated)
            shape = ((size - rotated) // each, each)
            tail[f"{name}_tail"] = Rows((rotated,), build.dtype, every)
        scales = Rows(shape[:-1], torch.float32, every, scales_of=name)
        return {name: Rows(shape, codes, every), **tail, f"{name}_scales": scales}

    def destinations(self) -> Iterator[tuple[str, Destination]]:
        """See :func:`reprise.loading.destinations.destinations`."""
        part, stored = (self._own_heads,), (self.sizes.heads,)
        yield f"{self.path}.attn_sink", Destination(self.attn_sink, part, stored)

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, hidden_size]. Returns as much."""
        x, sizes = tensor(x), self.sizes
        rotate = batch.positions, self.cos_sin
        low = self.down(x)
        rank = sizes.query_rank
        queries = self.up(ops.rms_norm(low[:, :rank], self.q_norm.weight, sizes.eps))
        heads = self.heads, sizes.head_size
        query = queries[:, : self.heads * sizes.head_size].unflatten(1, heads)
        query = ops.rotary_tail(query, *rotate, sizes.eps, False)
        table = batch.tables[self.window.table]
        cache, *codes = _tensors(self.window, "kv")
        ops.kv_insert(
            low[:, rank:], self.kv_norm.weight, sizes.eps, *rotate, table.slots, cache, *codes
        )
        compressed = tables = selected = None
        compressed_codes: list[Tensor | None] = [None, None]
        if self.compressor is not None:
            selected = self._store(x, queries, batch)
            compressed, *compressed_codes = _tensors(self.kept, "compressed")
            tables = batch.tables[self.kept.table].blocks
        attended = torch.empty_like(query)
        ops.sparse_attention(
            query, cache, table.blocks, compressed, tables, selected, self.attn_sink,
            batch.seq_lens, batch.query_start_loc, attended, sizes.head_size**-0.5,
            sizes.window, self.every, batch.query_len, *codes, *compressed_codes,
        )  # fmt: skip
        return Product(self.wo_b, self.wo_a.rotated_by_groups(attended, *rotate, self.groups))

    def _store(self, x: Tensor, queries: Tensor, batch: Batch) -> Tensor | None:
        """Make the rows that this step completes; returns those that each token is to see, or None:
        all."""
        gates = self.gates.wide(x)
        assert self.compressor is not None
        width = 2 * self.compressor.channels
        self._compressed(self.compressor, gates[:, :width], batch, "state", "compressed")
        if self.indexer is None:
            return None
        sizes = self.sizes
        keys, _, scales = _tensors(self.kept, "keys")
        own = gates[:, width : width + 2 * self.indexer.channels]
        self._compressed(self.indexer, own, batch, "index_state", "keys")
        shape = sizes.index_heads, sizes.index_size
        asked = queries[:, self.heads * sizes.head_size :].unflatten(1, shape)
        asked = ops.rotary_tail(asked, batch.positions, self.cos_sin, 0.0, False)
        selected = x.new_empty((len(x), sizes.index_top), dtype=torch.int32)
        ops.indexer(
            asked, gates[:, -sizes.index_heads :], keys, batch.tables[self.kept.table].blocks,
            batch.seq_lens, batch.query_start_loc, selected, self.every,
            (sizes.index_heads * sizes.index_size) ** -0.5, batch.query_len, scales,
        )  # fmt: skip
        return selected

    def _compressed(
        self, compressor: Compressor, projected: Tensor, batch: Batch, state: str, rows: str
    ) -> None:
        cache, *codes = _tensors(self.kept, rows)
        states, kept = batch.tables[self.states.table], batch.tables[self.kept.table]
        ops.compressor(
            projected, compressor.ape, self.states.tensors[state], states.slots, states.blocks,
            batch.positions, batch.query_start_loc, batch.seq_lens, compressor.gain,
            compressor.eps, self.cos_sin, cache, kept.slots, *codes,
        )  # fmt: skip


def _tensors(cache: LayerCache, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows of a cache; of codes the numbers beside them, and the scales."""
    tensors = cache.tensors
    return tensors[name], tensors.get(f"{name}_tail"), tensors.get(f"{name}_scales")

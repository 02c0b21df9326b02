from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from reprise import ops
from reprise.cache import KEPT, Batch, LayerCache, Rows, Window
from reprise.distributed import Share
from reprise.layers.build import Build
from reprise.layers.destination import Destination
from reprise.layers.lazy import Normed, Product
from reprise.layers.linear import Linear, Run
from reprise.layers.norm import RMSNorm
from reprise.layers.unseen import looks_at_nothing


@looks_at_nothing
class SelfAttention(nn.Module):
    """Grouped-query self-attention over the paged cache.

    Args:
        build: How to make it.
        hidden_size: Width of the residual stream.
        num_heads: Query heads (Hq).
        num_kv_heads: Key and value heads (Hkv).
        head_size: Channels of a head (D).
        cos_sin: Rotary table, see :func:`reprise.layers.rotary.rotary_table`.
        qkv_bias: The projections to Q, K and V have a bias.
        output_bias: The output projection has a bias.
        qk_norm_eps: Normalise query and key heads, with this epsilon; None: do not.
        norm: Makes these norms.
        output_gate: The query projection has a gate behind each head's query, whose sigmoid scales
            what the head's attention gives.
        sliding_window: Tokens that a token sees, itself included; 0: all.
        scale: Factor of the scores; None: ``head_size ** -0.5``.
        soft_cap: See the op; 0: none.
        input_size: Width of what it reads; None: ``hidden_size``.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        cos_sin: Tensor,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        norm: Callable[[Build, int, float], RMSNorm] = RMSNorm,
        output_gate: bool = False,
        sliding_window: int = 0,
        scale: float | None = None,
        soft_cap: float = 0.0,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        group = build.group
        own = group.share(num_heads, "num_attention_heads")
        own_kv = group.share_or_copy(num_kv_heads, "num_key_value_heads")
        self.num_heads, self.num_kv_heads = own.size, own_kv.size
        """This rank's."""
        self.head_size = head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        shape = (own_kv.size, head_size)
        rows = {name: Rows(shape, build.cache_dtype or build.dtype) for name in ("key", "value")}
        self.fixed_scales: Tensor | None = None
        """[2] float32: those of all keys and of all values that the checkpoint has; 0: none."""
        if build.cache_dtype is not None:
            rows["key_scales"] = Rows(shape[:1], torch.float32, scales_of="key")
            rows["value_scales"] = Rows(shape[:1], torch.float32, scales_of="value")
            self.fixed_scales = torch.zeros(2, dtype=torch.float32, device=build.device)
        self._path = build.path
        lifetime = Window(sliding_window) if sliding_window else KEPT
        self.cache = LayerCache(lifetime, **rows)
        self.cos_sin = cos_sin
        self.output_gate = output_gate

        def of_heads(begin: int) -> list[Run]:  # each head's query is followed by its gate
            heads, step = range(own.begin, own.begin + own.size), 2 * head_size
            total = num_heads * step
            return [Run("q_proj", each * step + begin, head_size, total) for each in heads]

        def of_share(name: str, heads: Share) -> Run:
            return Run(name, *(each * head_size for each in heads))

        kv = [of_share(name, own_kv) for name in ("k_proj", "v_proj")]
        queries = of_heads(0) if output_gate else [of_share("q_proj", own)]
        runs = [*queries, *kv, *(of_heads(head_size) if output_gate else ())]
        self.qkv_proj = Linear(build, input_size or hidden_size, runs, split="out", bias=qkv_bias)
        self.o_proj = Linear(
            build.at("o_proj"), num_heads * head_size, hidden_size, split="in", bias=output_bias
        )
        # Looking up a parameter takes an eager step longer than a tuple does.
        self._norms: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0)
        if qk_norm_eps is not None:
            self.q_norm = norm(build.at("q_norm"), head_size, qk_norm_eps)
            self.k_norm = norm(build.at("k_norm"), head_size, qk_norm_eps)
            self._norms = (self.q_norm.weight, self.k_norm.weight, qk_norm_eps)

    def destinations(self) -> Iterator[tuple[str, Destination | None]]:
        """The scales of all its keys and of all its values, by the names that tools give them; of
        no use to a cache of plain numbers."""
        for number, letter in enumerate("kv"):
            target = None
            if self.fixed_scales is not None:
                scale = self.fixed_scales[number : number + 1]
                target = Destination(scale, optional=True)
            for name in (
                f"{letter}_scale", f"{letter}_proj.{letter}_scale", f"{letter}_proj.output_scale"
            ):  # fmt: skip
                yield f"{self._path}.{name}", target

    def forward(self, x: Tensor | Normed, batch: Batch) -> Product:
        """x: [T, input_size]. Returns [T, hidden_size]."""
        table = batch.tables[self.cache.table]
        caches = self.cache.tensors
        key_cache, value_cache = caches["key"], caches["value"]
        key_scales, value_scales = caches.get("key_scales"), caches.get("value_scales")
        qkv, gate = self.qkv_proj(x), None
        if self.output_gate:
            width = self.num_heads * self.head_size
            qkv, gate = qkv[:, :-width], qkv[:, -width:]
        query = ops.rotary_cache(
            qkv,
            batch.positions,
            self.cos_sin,
            table.slots,
            key_cache,
            value_cache,
            *self._norms,
            key_scales,
            value_scales,
            self.fixed_scales,
        )
        attended = torch.empty_like(query)
        ops.paged_attention(
            query,
            key_cache,
            value_cache,
            table.blocks,
            batch.seq_lens,
            batch.query_start_loc,
            attended,
            self.scale,
            self.sliding_window,
            self.soft_cap,
            batch.query_len,
            key_scales,
            value_scales,
            batch.prompt,
        )
        attended = attended.flatten(1)
        if gate is not None:
            attended = ops.sigmoid_and_mul(attended, gate)
        return Product(self.o_proj, attended)

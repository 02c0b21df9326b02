"""A small transformer over a paged cache, and the Computation that the graph tests capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise import ops
from reprise.cache import Batch, Table
from reprise.graphs import Facts, Kind, Probe, Region
from reprise.graphs.regions import Units
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.shape import StepShape

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INNER, VOCAB = 64, 4, 2, 32, 96, 128
BLOCK, MAX_LEN = 16, 128
EPS = 1e-6


class Layer(nn.Module):
    def __init__(self, make: Callable[..., Tensor], cos_sin: Tensor, blocks: int) -> None:
        super().__init__()
        self.qkv = make((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN)
        self.project = make(HIDDEN, HEADS * HEAD_SIZE)
        self.up = make(2 * INNER, HIDDEN)
        self.down = make(HIDDEN, INNER)
        self.norm = make(HIDDEN)
        self.cos_sin = cos_sin
        cache = torch.zeros(2, blocks, BLOCK, KV_HEADS, HEAD_SIZE,
                            dtype=self.qkv.dtype, device=self.qkv.device)  # fmt: skip
        self.key_cache, self.value_cache = cache[0], cache[1]

    def forward(self, residual: Tensor, batch: Batch) -> None:
        table = batch.tables[0]
        x = ops.rms_norm(residual, self.norm, EPS)
        query = ops.rotary_cache(
            F.linear(x, self.qkv), batch.positions, self.cos_sin, table.slots,
            self.key_cache, self.value_cache, None, None, 0.0,
        )  # fmt: skip
        attended = torch.empty_like(query)
        ops.paged_attention(
            query, self.key_cache, self.value_cache, table.blocks, batch.seq_lens,
            batch.query_start_loc, attended, HEAD_SIZE**-0.5, 0, 0.0, batch.query_len,
        )  # fmt: skip
        ops.linear_add(attended.flatten(1), self.project, None, residual)
        x = ops.rms_norm(residual, self.norm, EPS)
        ops.linear_add(ops.silu_and_mul(F.linear(x, self.up)), self.down, None, residual)


class Model(nn.Module):
    def __init__(self, layers: int, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            return nn.Parameter(values.to(device, dtype), requires_grad=False)

        angles = torch.arange(MAX_LEN)[:, None] / 100 ** (torch.arange(HEAD_SIZE // 2) / 16)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
        self.embedding = make(VOCAB, HIDDEN)
        self.norm = make(HIDDEN)
        self.layers = nn.ModuleList(Layer(make, cos_sin, blocks) for _ in range(layers))

    def forward(self, batch: Batch) -> Tensor:
        residual = F.embedding(batch.token_ids, self.embedding)
        for layer in self.layers:
            layer(residual, batch)
        return ops.rms_norm(residual, self.norm, EPS)


FACTS = Facts(step={"phase": ("any",)}, row={"context": ("short", "long")})
"""Few, so that the probes of each graph meet all of them."""


class Slots:
    def __init__(self, caches: Mapping[str, Tensor], slots: Tensor) -> None:
        self.slots = slots.clone()
        self.caches = caches

    def read(self) -> Mapping[str, Tensor]:
        return {name: rows[self.slots].unsqueeze(0) for name, rows in self._rows()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        for name, rows in self._rows():
            rows[self.slots] = values[name][0]

    def spoil(self, values: Mapping[str, Tensor]) -> None:
        self.write({name: -1 - each for name, each in values.items()})

    def names(self, key: str) -> Sequence[str]:
        return [key]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.read().values())

    def scales(self, key: str) -> tuple[str, Sequence[int]] | None:
        return None

    def together(self, key: str) -> int:
        return 1

    def live(self, key: str, shape: StepShape) -> int:
        return shape.num_tokens

    def kept(self) -> list[Tensor]:
        return [self.slots]

    def read_by_someone(self, key: str | None = None) -> Tensor | None:
        return None

    def written(self) -> Units:
        return {"block": self.slots // BLOCK}

    def beside(self) -> Units:
        return self.near()

    def near(self) -> Units:
        count = len(next(iter(self.caches.values())))
        return {"block": torch.arange(count, device=self.slots.device)}

    def _rows(self) -> Iterator[tuple[str, Tensor]]:
        for name, cache in self.caches.items():
            yield name, cache.view(-1, KV_HEADS * HEAD_SIZE)


class Toy:
    """Implements reprise.graphs.Computation."""

    def __init__(
        self, platform: Platform, *, layers: int = 2, max_requests: int = 8, max_tokens: int = 64
    ) -> None:
        self.platform = platform
        self.ops = OpTable(platform)
        self.max_requests = max_requests
        self.largest = StepShape.mixed(max_tokens, max_requests)
        self.blocks_each = MAX_LEN // BLOCK
        self.num_blocks = 1 + self.blocks_each * max_requests
        self.model = Model(layers, self.num_blocks, platform.default_dtype, platform.device)
        self.forwards = 0
        self.refills_cache = True

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=platform.device)

        self.tokens, self.positions = zeros(max_tokens), zeros(max_tokens)
        self.slot_mapping = zeros(max_tokens)
        self.rows = zeros(max_requests)
        """No layer of this model reads where requests stand."""
        self.seq_lens = zeros(max_requests, dtype=torch.int32)
        self.query_start_loc = zeros(max_requests + 1, dtype=torch.int32)
        self.block_tables = zeros(max_requests, self.blocks_each, dtype=torch.int32)
        self.hidden = zeros(max_tokens, HIDDEN, dtype=platform.default_dtype)

    # ---- the protocol --------------------------------------------------------------------

    def forward(self, shape: StepShape, model: Callable[..., Any]) -> None:
        self.forwards += 1
        tokens, requests = shape.num_tokens, shape.num_requests
        table = Table(self.block_tables[:requests], self.slot_mapping[:tokens])
        batch = Batch(
            token_ids=self.tokens[:tokens],
            positions=self.positions[:tokens],
            rows=self.rows[:requests],
            query_start_loc=self.query_start_loc[: requests + 1],
            seq_lens=self.seq_lens[:requests],
            accepted=self.rows[:requests],
            known=self.rows[:requests],
            fresh=self.rows[:requests],
            tables=(table,),
            query_len=shape.query_len,
        )
        self.hidden[:tokens].copy_(model(batch))

    def pad(self, live: StepShape, bucket: StepShape) -> None:
        for each in (self.tokens, self.positions, self.slot_mapping):
            each[live.num_tokens : bucket.num_tokens] = 0
        self.seq_lens[live.num_requests : bucket.num_requests] = 0
        self.block_tables[live.num_requests : bucket.num_requests] = 0
        if live.num_requests == 0:
            self.query_start_loc[0] = 0
        self.query_start_loc[live.num_requests + 1 : bucket.num_requests + 1] = live.num_tokens

    def inputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        tokens, requests = shape.num_tokens, shape.num_requests
        return {
            "tokens": self.tokens[:tokens],
            "positions": self.positions[:tokens],
            "slot_mapping": self.slot_mapping[:tokens],
            "seq_lens": self.seq_lens[:requests],
            "query_start_loc": self.query_start_loc[: requests + 1],
            "block_tables": self.block_tables[:requests],
        }

    follow = None

    def outputs(self, shape: StepShape) -> Mapping[str, Tensor]:
        return {"hidden": self.hidden[: shape.num_tokens]}

    def probes(self, bucket: StepShape, anchor: bool) -> Sequence[Probe]:
        def probe(name: str, seed: int, longest: int) -> Probe:
            def fill() -> None:
                self.fill(bucket, seed=seed, longest=longest)

            fill()
            kind = self.kind(bucket, bucket)
            return Probe(name, fill, bucket, kind)

        return [probe("longest context", 1, MAX_LEN), probe("short contexts", 2, 24)]

    facts = FACTS
    lost: Sequence[str] | None = None

    def kind(self, live: StepShape, bucket: StepShape, exact: bool = False) -> Kind:
        lengths = self.seq_lens[: live.num_requests].cpu().numpy()
        return Kind((0,), FACTS.code((lengths > 24).astype(int)))

    def memory(self) -> Mapping[str, Region]:
        regions = {name: Region(each, "input") for name, each in self.inputs(self.largest).items()}
        for name, each in self.caches().items():
            regions[name] = Region(each, "cache", "block")
        for name, each in self.ops.memory.items():
            regions[f"memory of ops ({name})"] = Region(each, "ops")
        for name, each in self.weights().items():
            regions[name] = Region(each, "weight")
        return regions

    def weights(self) -> dict[str, Tensor]:
        return {name: each.data for name, each in getattr(self.model, "named_parameters", dict)()}

    def mend(self, weights: Sequence[str]) -> None:
        self.lost = weights

    def caches(self) -> dict[str, Tensor]:
        return {
            f"layer {number} {name}": cache
            for number, layer in enumerate(self.model.layers)
            for name, cache in (("key", layer.key_cache), ("value", layer.value_cache))
        }

    def state(self, bucket: StepShape) -> Slots:
        return Slots(self.caches(), self.slot_mapping[: bucket.num_tokens])

    # ---- steps ---------------------------------------------------------------------------

    def fill(self, shape: StepShape, seed: int, longest: int = MAX_LEN) -> None:
        """Random requests: scattered pages, contexts of 1 to ``longest`` tokens, one of each."""
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high, size, generator=generator)

        new = self._new_tokens(shape)
        longest = max(longest, int(new.max()))
        past = torch.stack([draw(0, longest - int(n) + 1, 1)[0] for n in new])
        past[0] = longest - new[0]
        pages = 1 + torch.randperm(self.num_blocks - 1, generator=generator)
        tables = pages[: shape.num_requests * self.blocks_each].view(-1, self.blocks_each)
        rows = torch.repeat_interleave(torch.arange(shape.num_requests), new)
        ends = new.cumsum(0)
        positions = torch.arange(shape.num_tokens) - (ends - new)[rows] + past[rows]
        slots = tables[rows, positions // BLOCK] * BLOCK + positions % BLOCK
        self.tokens[: shape.num_tokens] = draw(0, VOCAB, shape.num_tokens).to(self.tokens.device)
        for target, source in (
            (self.positions, positions), (self.slot_mapping, slots), (self.seq_lens, past + new),
            (self.query_start_loc[1:], ends), (self.block_tables, tables),
        ):  # fmt: skip
            target[: source.shape[0]] = source.to(target.device, target.dtype)
        if not self.refills_cache:
            return
        # Every past token has keys and values.
        for layer in self.model.layers:
            for cache in (layer.key_cache, layer.value_cache):
                values = torch.randn(cache.shape, generator=generator)
                cache.copy_(values.to(cache.device, cache.dtype))

    def eager(self, shape: StepShape) -> Tensor:
        with torch.inference_mode(), self.ops.activate():
            self.forward(shape, self.model)
        return self.hidden[: shape.num_tokens].clone()

    def _new_tokens(self, shape: StepShape) -> Tensor:
        if shape.phase == "decode":
            return torch.full((shape.num_requests,), shape.query_len)
        even, rest = divmod(shape.num_tokens, shape.num_requests)
        counts = torch.full((shape.num_requests,), even)
        counts[0] += rest
        return counts

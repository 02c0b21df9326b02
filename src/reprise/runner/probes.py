"""Made-up steps on which a graph is compared with eager execution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reprise.graphs.computation import Probe
from reprise.graphs.shape import StepShape
from reprise.runner.buffers import Ints, StepBuffers

MIN_BLOCKS = 64
"""Cache blocks, spread over the whole cache, that hold the contexts of the probes."""


class ProbeMaker:
    """Makes the inputs of probes. All of them read and write a few blocks of random content.

    Contexts may repeat blocks, so that the longest context needs few of them; blocks that a step
    writes are each written by one request only.

    Args:
        buffers: Where the inputs go.
        layers: Attention layers, whose caches get the random content.
        vocab_size: Token ids are below.
        max_model_len: Length of the longest context.
        num_blocks: Of the cache, the null block included.
    """

    def __init__(
        self,
        buffers: StepBuffers,
        layers: Sequence[Any],
        *,
        vocab_size: int,
        max_model_len: int,
        num_blocks: int,
    ) -> None:
        self._buffers = buffers
        self._layers = layers
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._num_blocks = num_blocks
        self._blocks: Ints = np.zeros(0, dtype=np.int32)
        self._filled = False

    def probes(self, bucket: StepShape) -> list[Probe]:
        """The most telling probe first; see :class:`reprise.graphs.computation.Computation`."""
        whole = self._most_requests(bucket)
        part = max(1, whole * 2 // 3)
        half = max(1, self._max_model_len // 2)
        short = min(self._max_model_len, self._buffers.block_size + 1)
        return [
            self._probe("longest context", bucket, whole, self._max_model_len, seed=1),
            self._probe("part of the bucket", bucket, part, half, seed=2),
            self._probe("short contexts", bucket, whole, short, seed=3),
        ]

    def probe(self, bucket: StepShape, context: int) -> Probe:
        """A full bucket whose longest request has exactly ``context`` tokens."""
        whole = self._most_requests(bucket)
        return self._probe(f"context of {context}", bucket, whole, context, seed=4)

    def _most_requests(self, bucket: StepShape) -> int:
        """Live requests whose written blocks are all different."""
        return max(1, min(bucket.num_requests, bucket.num_tokens, (self._num_blocks - 1) // 2))

    def _probe(self, name: str, bucket: StepShape, requests: int, longest: int, seed: int) -> Probe:
        random = np.random.default_rng([seed, bucket.size, bucket.query_len])
        counts = self._new_tokens(bucket, requests, random)
        lengths = np.minimum(longest, counts + self._contexts(requests, longest, random))
        counts = np.minimum(counts, lengths)
        tables = self._tables(counts, lengths, random)
        tokens = int(counts.sum())
        ids = random.integers(0, self._vocab_size, tokens)
        live = StepShape(bucket.phase, tokens, requests, bucket.query_len)

        def fill() -> None:
            self._fill_blocks()
            self._buffers.fill_rows(counts, lengths, tables, ids)
            self._buffers.fill_padding(tokens, requests, bucket.num_tokens, bucket.num_requests)

        return Probe(name, fill, live)

    def _new_tokens(self, bucket: StepShape, requests: int, random: np.random.Generator) -> Ints:
        """New tokens of each request; in a mixed step most decode and the last are chunks."""
        if bucket.phase == "decode":
            return np.full(requests, bucket.query_len)
        counts = np.ones(requests, dtype=np.int64)
        blocks_left = self._num_blocks - 1 - requests
        spare = bucket.num_tokens - requests
        for row in range(requests - 1, max(-1, requests - 4), -1):
            room = min(blocks_left * self._buffers.block_size, self._max_model_len - 1)
            extra = int(min(spare, room, spare if row == requests - 3 else spare // 2 + 1))
            counts[row] += max(0, extra)
            spare -= max(0, extra)
            blocks_left -= -(-max(0, extra) // self._buffers.block_size)
        return counts

    def _contexts(self, requests: int, longest: int, random: np.random.Generator) -> Ints:
        """Tokens before the new ones: one request as long as can be, a few spread evenly on a
        logarithmic scale, the rest short, so that a probe is cheap."""
        contexts = random.integers(0, 4 * self._buffers.block_size, requests)
        spread = np.geomspace(max(2, longest), 1, num=min(requests, 8)).astype(np.int64)
        contexts[: len(spread)] = spread
        return contexts

    def _tables(self, counts: Ints, lengths: Ints, random: np.random.Generator) -> Ints:
        """Scattered block tables; the blocks that new tokens go to are each used once."""
        size = self._buffers.block_size
        first = (lengths - counts) // size
        last = (lengths - 1) // size
        written = int((last - first + 1).sum())
        wanted = min(self._num_blocks - 1, max(MIN_BLOCKS, 2 * written))
        self._take_blocks(wanted)
        shuffled = random.permutation(self._blocks[:wanted])
        fresh, shared = shuffled[:written], shuffled[written:] if wanted > written else shuffled
        tables = np.zeros((len(counts), int(last.max()) + 1), dtype=np.int32)
        begin = 0
        for row in range(len(counts)):
            tables[row, : first[row]] = random.choice(shared, first[row])
            end = begin + int(last[row] - first[row]) + 1
            tables[row, first[row] : last[row] + 1] = fresh[begin:end]
            begin = end
        return tables

    def _take_blocks(self, count: int) -> None:
        """Choose blocks from the whole cache, the highest included, keeping those chosen before."""
        if count > len(self._blocks):
            spread = np.linspace(self._num_blocks - 1, 1, count).astype(np.int32)
            rest = np.setdiff1d(spread, self._blocks)
            more = np.setdiff1d(np.arange(1, self._num_blocks, dtype=np.int32), spread)
            candidates = np.concatenate((self._blocks, rest, more[: 2 * count]))
            _, order = np.unique(candidates, return_index=True)
            self._blocks = candidates[np.sort(order)][:count].astype(np.int32)
            self._filled = False

    def _fill_blocks(self) -> None:
        """Random content for the probes' blocks, the same at every call."""
        if self._filled:
            return
        device = self._layers[0].key_cache.device
        blocks = torch.from_numpy(self._blocks).to(device, torch.int64)
        generator = torch.Generator(device=device).manual_seed(0)
        for layer in self._layers:
            for cache in (layer.key_cache, layer.value_cache):
                shape = (len(blocks), *cache.shape[1:])
                content = torch.randn(shape, generator=generator, device=device)
                cache[blocks] = content.to(cache.dtype)
        self._filled = True

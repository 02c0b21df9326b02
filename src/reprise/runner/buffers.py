"""Tensors that keep their addresses: a step is written into them, a graph reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.attention import AttentionMetadata
from reprise.platforms import Platform
from reprise.step import ScheduledRequest

Ints = np.ndarray[Any, Any]


class Mirrored:
    """A device tensor with a host side to fill it from.

    Where the device reads host memory as it is, both are one. Elsewhere the host side is a pair
    of page-locked buffers in turn, since a copy may still be under way when the next step is
    filled; at most one step may be outstanding.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, platform: Platform) -> None:
        self.device = torch.zeros(*shape, dtype=dtype, device=platform.device)
        self._shared = platform.device.type == "cpu"
        if self._shared:
            self._staging = [self.device]
        else:
            pin = platform.pins_memory
            self._staging = [torch.zeros(*shape, dtype=dtype, pin_memory=pin) for _ in range(2)]
        self._hosts: list[Ints] = [each.numpy() for each in self._staging]
        self._turn = 0

    @property
    def host(self) -> Ints:
        """Write here, then :meth:`upload`."""
        return self._hosts[self._turn]

    def upload(self, begin: int, end: int) -> None:
        """Make rows ``begin`` to ``end`` of the host side visible on the device."""
        if not self._shared and end > begin:
            self.device[begin:end].copy_(self._staging[self._turn][begin:end], non_blocking=True)

    def flip(self) -> None:
        """Switch to the other staging buffer; its old content is stale."""
        self._turn = (self._turn + 1) % len(self._hosts)


class StepBuffers:
    """The inputs of one step, for at most ``max_tokens`` tokens of ``max_requests`` requests.

    Args:
        max_tokens: Most new tokens in a step.
        max_requests: Most requests in a step.
        max_blocks: Most cache blocks of one request.
        block_size: Tokens in a block.
        platform: Where the device side lives.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        block_size: int,
        platform: Platform,
    ) -> None:
        self.block_size = block_size
        self.input_ids = Mirrored((max_tokens,), torch.int64, platform)
        self.positions = Mirrored((max_tokens,), torch.int64, platform)
        self.slot_mapping = Mirrored((max_tokens,), torch.int64, platform)
        self.query_start_loc = Mirrored((max_requests + 1,), torch.int32, platform)
        self.seq_lens = Mirrored((max_requests,), torch.int32, platform)
        self.block_tables = Mirrored((max_requests, max_blocks), torch.int32, platform)
        self._tables = np.zeros((max_requests, max_blocks), dtype=np.int32)
        self._owners: list[list[int] | None] = [None] * max_requests
        self._filled = [0] * max_requests
        self._all = (
            self.input_ids,
            self.positions,
            self.slot_mapping,
            self.query_start_loc,
            self.seq_lens,
            self.block_tables,
        )

    def fill(self, scheduled: Sequence[ScheduledRequest]) -> tuple[int, int]:
        """Write a step's requests in their order; returns (tokens, requests)."""
        for mirrored in self._all:
            mirrored.flip()
        requests = len(scheduled)
        counts = np.fromiter((each.num_tokens for each in scheduled), np.int64, requests)
        starts = np.fromiter((each.start for each in scheduled), np.int64, requests)
        self._fill_tables(scheduled)
        begin = 0
        for each in scheduled:
            # A pending token is not known here; the runner takes it over on the device.
            known = each.num_tokens - each.pending
            tokens_of = each.request.token_ids
            self.input_ids.host[begin : begin + known] = tokens_of[each.start : each.start + known]
            begin += each.num_tokens
        self._fill_rows(counts, starts + counts)
        return begin, requests

    def fill_rows(self, counts: Ints, lengths: Ints, tables: Ints, token_ids: Ints) -> None:
        """Write a made-up step.

        Args:
            counts: [R], new tokens of each request.
            lengths: [R], tokens of each request, the new ones included.
            tables: [R, M] int32, blocks of each request.
            token_ids: [T], the new tokens.
        """
        for mirrored in self._all:
            mirrored.flip()
        requests, width = tables.shape
        self.forget_tables()
        self._tables[:requests, :width] = tables
        self.block_tables.host[:requests] = self._tables[:requests]
        self.block_tables.upload(0, requests)
        self.input_ids.host[: len(token_ids)] = token_ids
        self._fill_rows(counts, lengths)

    def _fill_rows(self, counts: Ints, lengths: Ints) -> None:
        """All that follows from the tables and from how many tokens each request has."""
        requests = len(counts)
        ends = np.cumsum(counts)
        tokens = int(ends[-1])
        rows = np.repeat(np.arange(requests), counts)
        positions = np.arange(tokens) + (lengths - ends)[rows]
        blocks = self._tables[rows, positions // self.block_size].astype(np.int64)
        self.positions.host[:tokens] = positions
        self.slot_mapping.host[:tokens] = blocks * self.block_size + positions % self.block_size
        self.query_start_loc.host[0] = 0
        self.query_start_loc.host[1 : requests + 1] = ends
        self.seq_lens.host[:requests] = lengths
        for per_token in (self.input_ids, self.positions, self.slot_mapping):
            per_token.upload(0, tokens)
        self.query_start_loc.upload(0, requests + 1)
        self.seq_lens.upload(0, requests)

    def fill_padding(self, tokens: int, requests: int, to_tokens: int, to_requests: int) -> None:
        """Make the rows from a step's end to a bucket's end harmless: null block, length 0."""
        for per_token in (self.input_ids, self.positions, self.slot_mapping):
            per_token.host[tokens:to_tokens] = 0
            per_token.upload(tokens, to_tokens)
        self.query_start_loc.host[requests + 1 : to_requests + 1] = tokens
        self.query_start_loc.upload(requests + 1, to_requests + 1)
        self.seq_lens.host[requests:to_requests] = 0
        self.seq_lens.upload(requests, to_requests)

    def metadata(self, tokens: int, requests: int, query_len: int) -> AttentionMetadata:
        """Views of the device side for a step of this size."""
        return AttentionMetadata(
            query_start_loc=self.query_start_loc.device[: requests + 1],
            seq_lens=self.seq_lens.device[:requests],
            block_tables=self.block_tables.device[:requests],
            slot_mapping=self.slot_mapping.device[:tokens],
            query_len=query_len,
        )

    def views(self, tokens: int, requests: int) -> dict[str, Tensor]:
        """The device side of every input, cut to a step of this size."""
        return {
            "input_ids": self.input_ids.device[:tokens],
            "positions": self.positions.device[:tokens],
            "slot_mapping": self.slot_mapping.device[:tokens],
            "query_start_loc": self.query_start_loc.device[: requests + 1],
            "seq_lens": self.seq_lens.device[:requests],
            "block_tables": self.block_tables.device[:requests],
        }

    def forget_tables(self) -> None:
        """The device's block tables were overwritten; send every row again."""
        self._owners = [None] * len(self._owners)

    def _fill_tables(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Bring the block tables up to date, sending only the span of rows that changed."""
        first, last = len(scheduled), -1
        for row, each in enumerate(scheduled):
            blocks = each.block_ids
            # The list is the request's as long as it runs; it grows, but never changes.
            filled = self._filled[row] if self._owners[row] is blocks else 0
            if filled == len(blocks):
                continue
            self._tables[row, filled : len(blocks)] = blocks[filled:]
            self._owners[row], self._filled[row] = blocks, len(blocks)
            first, last = min(first, row), row
        if last >= 0:
            self.block_tables.host[first : last + 1] = self._tables[first : last + 1]
            self.block_tables.upload(first, last + 1)

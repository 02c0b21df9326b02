"""Passes of what drafts from hidden states, over caches of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reprise.cache.layout import lay_out_caches
from reprise.cache.memory import allocate_caches
from reprise.models.deepseek_v4 import NextStreams
from reprise.models.eagle3 import Eagle3
from reprise.models.mtp import NextTokens
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers

BLOCK = 4


class HeadSteps:
    """Runs a head over one request's tokens, in blocks that do not adjoin.

    Args:
        head: With its weights.
        platform: The device.
        length: Most tokens in a step.
    """

    def __init__(
        self, head: Eagle3 | NextTokens | NextStreams, platform: Platform, length: int
    ) -> None:
        self.head = head
        caches = head.caches()
        layout = lay_out_caches(caches, BLOCK, 0)
        layout = dataclasses.replace(
            layout, pools=tuple(dataclasses.replace(p, num_blocks=33) for p in layout.pools)
        )
        allocate_caches(caches, layout, platform)
        self.buffers = StepBuffers(length, 1, 64, layout, platform)
        self.ops = OpTable(platform)
        self.table = np.array([[*range(31, 0, -2)]], dtype=np.int32)
        self.device = platform.device

    def __call__(self, begin: int, ids: Sequence[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of tokens from position ``begin`` on, from what the head has
        prepared or gave for the tokens before them."""
        count = len(ids)
        self.buffers.fill_rows(
            np.array([count]), np.array([begin + count]), [self.table], np.array(ids),
            np.array([count]), np.array([0]),
        )  # fmt: skip
        batch = self.buffers.batch(count, 1, 1 if count == 1 else 0)
        with torch.inference_mode(), self.ops.activate():
            before = hidden.to(self.device)
            kept = before.clone()
            after = self.head(batch, before)
            assert torch.equal(before, kept), "what it reads is the caller's"
            logits = torch.empty(count, self.head.vocab_size, device=self.device)
            self.head.logits(after, logits)
        return after.cpu(), logits.cpu()

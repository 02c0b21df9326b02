"""The table of masks on the device, of which a step's rows have the numbers of theirs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reprise.platforms import Platform
from reprise.runner.arena import Ints, to_device
from reprise.step import Masks


class MaskWords:
    """A runner's. A step that has masks is given when those before it have brought their tokens, so
    that what was sent for them may be written again here.

    Args:
        vocab_size: Of the logits.
        platform: The device.
    """

    def __init__(self, vocab_size: int, platform: Platform) -> None:
        self._platform = platform
        size = (0, -(-vocab_size // 32))
        self._words = torch.zeros(size, dtype=torch.int32, device=platform.device)
        self._which = torch.zeros(0, dtype=torch.int64, device=platform.device)
        """The place of each row's mask in the last step that had any, -1 for none."""
        self._sent: Ints = self._which.cpu().numpy()
        """[capacity], what was sent there, in memory that the device copies from."""
        self._num_sent = 0

    def forget(self) -> None:
        """What rows had is not what they should have."""
        self._num_sent = 0

    def of(self, masks: Masks, num_rows: int) -> tuple[Tensor, Tensor]:
        """What is new in them is sent.

        Args:
            masks: Of the step.
            num_rows: N, rows of logits.

        Returns:
            [N] int64, the place of each row's mask in the table, -1 for none; and [P, ceil(V / 32)]
            int32, the table. Both on the device, until the next call.
        """
        if masks.size > len(self._words):
            before = self._words
            self._words = before.new_zeros((masks.size, before.shape[1]))
            self._words[: len(before)] = before
        for begin, words in masks.words:
            to_device(words, self._platform, self._words[begin : begin + len(words)])
        return self._which_of(masks, num_rows), self._words

    def _which_of(self, masks: Masks, num_rows: int) -> Tensor:
        if num_rows > len(self._which):
            size = 1 << (num_rows - 1).bit_length()
            self._which = self._which.new_zeros(size)
            pinned = self._platform.pins_memory
            self._sent = torch.empty(size, dtype=torch.int64, pin_memory=pinned).numpy()
            self._num_sent = 0
        which = np.full(num_rows, -1, dtype=np.int64)
        which[masks.rows] = masks.places
        if self._num_sent != num_rows or not np.array_equal(self._sent[:num_rows], which):
            self._sent[:num_rows] = which
            to_device(self._sent[:num_rows], self._platform, self._which[:num_rows])
            self._num_sent = num_rows
        return self._which[:num_rows]

"""The table of masks on the device, of which a step's rows have the numbers of theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.platforms import Platform
from reprise.runner.arena import to_device
from reprise.step import Masks


class MaskWords:
    """A runner's.

    Args:
        vocab_size: Of the logits.
        platform: The device.
    """

    def __init__(self, vocab_size: int, platform: Platform) -> None:
        self._platform = platform
        size = (0, -(-vocab_size // 32))
        self._words = torch.zeros(size, dtype=torch.int32, device=platform.device)

    def of(self, masks: Masks) -> Tensor:
        """[P, ceil(V / 32)] int32 on the device, until the next call: the table with what is new in
        it."""
        if masks.size > len(self._words):
            before = self._words
            self._words = before.new_zeros((masks.size, before.shape[1]))
            self._words[: len(before)] = before
        for begin, words in masks.words:
            to_device(words, self._platform, self._words[begin : begin + len(words)])
        return self._words

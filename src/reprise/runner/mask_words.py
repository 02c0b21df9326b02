"""Masks on the device, where those stay that the next step has again."""

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
        """[M, ceil(V / 32)] int32 on the device, until the next call: those that are given, and of
        the others what was given last in their places."""
        count, (given, width) = len(masks.rows), masks.words.shape
        if count > len(self._words):
            before = self._words
            self._words = before.new_zeros((1 << (count - 1).bit_length(), width))
            self._words[: len(before)] = before
        if given:
            places = self._words[masks.begin : masks.begin + given]
            to_device(masks.words, self._platform, places)
        return self._words[:count]

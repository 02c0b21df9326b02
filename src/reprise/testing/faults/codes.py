"""Faults in what eight-bit codes of a cache stand for: scales that are not those of their rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from reprise.ops.registry import Op
from reprise.platforms import Platform
from reprise.platforms.device_graph import capturing
from reprise.testing.faults.base import Fault


class CodeFault(Fault):
    """Of an op that writes codes and scales to ``slot_mapping``. A cache of plain numbers has none,
    and no harm is done to it."""

    engine_options: ClassVar[Mapping[str, Any]] = {"kv_cache_dtype": "fp8"}
    reads = frozenset({"slot_mapping", "key_scales", "value_scales"})
    without = "the op writes no scales"

    @classmethod
    def inexpressible(cls, op: Op, executor: str, platform: Platform) -> str | None:
        reason = super().inexpressible(op, executor, platform)
        if reason is None and platform.fp8_dtype is None:
            return "the platform has no eight-bit floating-point numbers"
        return reason

    def run(self, named: dict[str, Any]) -> Any:
        result = self.proceed(named)
        if capturing() and named.get("key_scales") is not None:
            slots, size = named["slot_mapping"], named["key_cache"].shape[1]
            self.harm(named, slots // size, slots % size)
        return result

    @abstractmethod
    def harm(self, named: dict[str, Any], block: Tensor, offset: Tensor) -> None:
        """Spoil what was written at these places, [T] each."""


class ScaleFault(CodeFault):
    """Other scales are written than those that the rows have."""

    def harm(self, named: dict[str, Any], block: Tensor, offset: Tensor) -> None:
        for name in ("key_scales", "value_scales"):
            scales = named[name].transpose(1, 2)
            scales[block, offset] = self.wrong(scales[block, offset])

    @abstractmethod
    def wrong(self, scales: Tensor) -> Tensor:
        """What to write instead of these: [T, Hkv]."""


class WrongScale(ScaleFault):
    name = "wrong_scale"
    summary = "the scales of the rows written are twice as large as they should be"

    def wrong(self, scales: Tensor) -> Tensor:
        return scales * 2


class ScaleOfAnotherHead(ScaleFault):
    name = "scale_of_another_head"
    summary = "each head's row has the scale of the head beside it"

    def wrong(self, scales: Tensor) -> Tensor:
        return scales.roll(1, dims=1)


class ScaleOfAnotherToken(ScaleFault):
    name = "scale_of_another_token"
    summary = "each token's row has the scale of the token before it in the step"

    def wrong(self, scales: Tensor) -> Tensor:
        return scales.roll(1, dims=0)


class UnscaledRow(CodeFault):
    name = "unscaled_row"
    summary = "values are written as they are and not divided by their scale"

    def harm(self, named: dict[str, Any], block: Tensor, offset: Tensor) -> None:
        cache, scales = named["value_cache"], named["value_scales"].transpose(1, 2)
        codes = cache.view(torch.uint8)
        written = codes[block, offset].view(cache.dtype).float()
        raw = (written * scales[block, offset].unsqueeze(-1)).to(cache.dtype)
        codes[block, offset] = raw.view(torch.uint8)

"""Random content for the caches that probes read from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.cache.memory import PoolTensor
from reprise.cache.spec import Rows
from reprise.graphs.kinds import Ints
from reprise.graphs.regions import Stack
from reprise.runner.arena import to_device
from reprise.runner.step_inputs import StepInputs

BANK = 61
"""Blocks of random content, repeated over all blocks of probes. A prime number: a kernel whose
block numbers or addresses lack a bit reads a block whose distance is a power of two, which must not
have the content of the right one."""
PIECE = 64 << 20
"""Bytes of content that are made at a time."""

Caches = Callable[[], tuple[Sequence[Mapping[str, PoolTensor]], Sequence[Sequence[Stack]]]]
"""Gives of each pool the caches by name, and stacked, [C, N, ...] each."""


class CacheContent:
    """Fills blocks before a probe reads from them, each once.

    Args:
        buffers: They know which blocks steps have touched.
        caches: Get the content.
    """

    def __init__(self, buffers: StepInputs, caches: Caches) -> None:
        self._buffers = buffers
        self._caches = caches
        self._layout = buffers.layout
        self._banks: dict[Any, Tensor] = {}
        """By the layout of a block."""
        self._has_content = [np.zeros(each.num_blocks, dtype=bool) for each in buffers.layout.pools]

    def fill(self, tables: Sequence[Ints]) -> None:
        """Random content for those blocks of tables that have none yet, neither from here nor of a
        request."""
        touched = self._buffers.touched_blocks()
        for number, (pool, stacks, has_content) in enumerate(
            zip(*self._caches(), self._has_content, strict=True)
        ):
            has_content[: touched[number]] = True
            wanted = np.zeros(len(has_content), dtype=bool)
            for table, layout in zip(tables, self._layout.tables, strict=True):
                if layout.pool == number:
                    wanted[table] = True
            new = (wanted & ~has_content).nonzero()[0]
            if len(new):
                has_content[new] = True
                self._fill_new(pool, stacks, new)

    def _fill_new(
        self, pool: Mapping[str, PoolTensor], stacks: Sequence[Stack], blocks: Ints
    ) -> None:
        """All caches of a stack at once, so that it takes few launches."""
        generator: torch.Generator | None = None
        number = 0
        for stack in stacks:
            cache = stack.tensor
            kind = (cache.shape[2:], pool[stack.names[0]].rows)
            if kind not in self._banks:
                generator = generator or torch.Generator(device=cache.device).manual_seed(0)
                self._banks[kind] = _random_rows((BANK, *kind[0]), kind[1], generator)
            numbers = np.arange(number, number + len(cache))[:, None]
            number += len(cache)
            most = max(1, PIECE // (len(cache) * math.prod(kind[0]) * cache.itemsize))
            for begin in range(0, len(blocks), most):
                some = blocks[begin : begin + most].astype(np.int64)
                places = to_device(some, self._buffers.platform)
                content = to_device((some * 7 + numbers) % BANK, self._buffers.platform)
                cache[:, places] = self._banks[kind][content]


def _random_rows(shape: tuple[int, ...], rows: Rows, generator: torch.Generator) -> Tensor:
    """Normal numbers; where rows are not numbers but packed bytes, any bytes. Scales are from 0.5
    to 1.5, so that what codes stand for is as large as other numbers."""
    device, dtype = generator.device, rows.dtype
    if rows.scales_of is not None:
        return (
            torch.rand(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)
            + 0.5
        )
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)
    bounds = torch.iinfo(dtype)
    return torch.randint(
        bounds.min, bounds.max + 1, shape, generator=generator, device=device, dtype=dtype
    )

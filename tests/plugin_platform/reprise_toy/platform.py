"""The toy device: PyTorch's CPU behind a name and limits of its own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from reprise.platforms import Adjustment, MemoryInfo, Platform

MEMORY = 1 << 28


class ToyPlatform(Platform):
    name = "toy"
    device_type = "cpu"
    is_the_host = True
    priority = -1
    default_block_size = 8
    default_batched_tokens = 64
    most_requests = 4
    fp8_dtype = torch.float8_e4m3fn

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    @property
    def default_dtype(self) -> torch.dtype:
        return torch.float32

    def prefers_dtype(self, dtype: torch.dtype) -> bool:
        return dtype is torch.float32

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(free=MEMORY, total=MEMORY)

    def check_config(self, config: Any) -> tuple[Any, list[Adjustment]]:
        if config.max_num_seqs <= self.most_requests:
            return config, []
        change = Adjustment(
            "max_num_seqs", config.max_num_seqs, self.most_requests, "a toy is small"
        )
        return config.replace(max_num_seqs=self.most_requests), [change]

    # Its calls return when their work is done: there is no order of work to manage.

    def activate(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def current_stream(self) -> Any:
        return None

    def use_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

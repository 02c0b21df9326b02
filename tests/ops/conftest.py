"""Fixtures of the op tests: implementations by name, and the dtypes worth testing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reprise.ops import Op
from reprise.platforms import Platform


@pytest.fixture
def implementation(platform: Platform) -> Callable[[Op, str], Callable[..., Any]]:
    """``implementation(op, name)``: its function; the test is skipped where it cannot run."""

    def find(op: Op, name: str) -> Callable[..., Any]:
        found = op.implementations[name]
        reason = found.requires(platform)
        if reason is not None:
            pytest.skip(f"{op.name}={name}: {reason}")
        return found.function

    return find


@pytest.fixture
def dtypes(platform: Platform) -> tuple[torch.dtype, ...]:
    """bfloat16 on accelerators only: Triton's interpreter truncates where devices round."""
    if platform.device_type == "cpu":
        return torch.float32, torch.float16
    return torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def randn(platform: Platform) -> Callable[..., torch.Tensor]:
    """``randn(*shape, dtype=...)``: the same numbers on every device, new ones at each call."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(platform.device, dtype)

    return make

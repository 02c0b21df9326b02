"""Fixtures of the op tests: implementations by name, and the dtypes worth testing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


@pytest.fixture
def no_device(device: str) -> None:
    """The test is skipped where there is one, and where nothing compiles for those that are not
    there."""
    if device != "cpu":
        pytest.skip("no device takes part, so the run without one is enough")
    pytest.importorskip("triton")


@pytest.fixture
def compiling() -> Callable[..., list[str]]:
    """``compiling(script, *arguments)``: the lines that a script beside the tests prints, in a
    process of its own: where a kernel was interpreted, none is compiled any more."""

    def run(script: str, *arguments: str) -> list[str]:
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    return run

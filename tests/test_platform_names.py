"""What is computed asks what a device can do: models, layers and ops name no platform."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

import reprise

SOURCE = Path(reprise.__file__).parent
NAMES = {
    "cuda",
    "rocm",
    "xpu",
    "nvidia",
    "amd",
    "intel",
    "hip",
    "npu",
    "mps",
    "musa",
    "is_cuda",
    "is_rocm",
    "is_xpu",
}
ALLOWED = {"ops/triton_util.py": {"cuda"}}
"""Triton keeps the instructions of programmatic launch under that name; who has them is asked of
the platform."""
FILES = sorted(
    path for part in ("models", "layers", "ops") for path in (SOURCE / part).rglob("*.py")
)


def names_in(code: str) -> set[str]:
    """Words of identifiers, and of strings without blanks: what code can compare or look up."""
    found: set[str] = set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME:
            found.add(token.string.lower())
        elif token.type == tokenize.STRING and not re.search(r"\s", token.string):
            found.update(re.findall(r"[a-z_]+", token.string.lower()))
    return found


def test_code_names_no_platform() -> None:
    found = {
        name: names_in(path.read_text(encoding="utf-8")) & NAMES - ALLOWED.get(name, set())
        for path in FILES
        if (name := path.relative_to(SOURCE).as_posix())
    }
    assert not {name: each for name, each in found.items() if each}


@pytest.mark.parametrize("code", ["x.is_cuda", 'x.device.type == "xpu"', "torch.cuda.empty_cache"])
def test_conditions_on_platforms_are_found(code: str) -> None:
    assert names_in(code) & {"is_cuda", "xpu", "cuda"}

import torch

from reprise.distributed import ECHO
from reprise.ops.cases import EPS, Arguments, Cases, Maker


def _small(make: Maker) -> list[Arguments]:
    """Of a group whose ranks are all this one: others are processes, which their tests start."""
    return [{"x": make.randn(rows, 96), "group": ECHO.name} for rows in (1, 5)]


def _add(make: Maker) -> list[Arguments]:
    return [
        {"partial": make.randn(rows, 96), "residual": make.randn(rows, 96), "group": ECHO.name}
        for rows in (1, 5)
    ]


def _add_norm(make: Maker) -> list[Arguments]:
    gains = make.randn(96), make.randn(96, dtype=torch.float32)
    return [
        {**each, "weight": gain, "eps": EPS}
        for each, gain in zip(_add(make), gains, strict=True)
    ]  # fmt: skip


cases = Cases(_small)
add_cases = Cases(_add)
add_norm_cases = Cases(_add_norm)

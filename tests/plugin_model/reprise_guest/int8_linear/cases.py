import torch

from reprise.ops.cases import Arguments, Cases, Maker


def _small(make: Maker) -> list[Arguments]:
    weight = make.randint(127, 48, 32, dtype=torch.int8)
    scale = make.randn(48, 1, dtype=torch.float32) / 127
    return [
        {"x": make.randn(rows, 32), "weight": weight, "scale": scale, "bias": bias}
        for rows in (1, 9)
        for bias in (None, make.randn(48))
    ]


cases = Cases(_small)

"""Figures of models with experts count the experts that steps read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TinyModels

from reprise.bench.floor import decode_bytes
from reprise.bench.latency import latency
from reprise.bench.presets import LatencyWork


def test_the_floor_of_a_step_has_the_experts_that_it_hits(tiny: TinyModels, device: str) -> None:
    model = tiny("qwen3_moe")
    options: dict[str, Any] = {
        "device": device, "dtype": "float32", "num_blocks": 65, "graph_mode": "full",
        "graph_buckets": "decode=1,4;mixed=32", "max_num_seqs": 4, "max_model_len": 128,
    }  # fmt: skip
    work = LatencyWork((1, 4), (9,), (3, 6), str(model.path), options)
    record = latency(work, {}, repeats=1)
    one, four = record["results"]
    assert one["experts_hit"] == one["experts_hit_if_uniform"] == 3
    assert 3 < four["experts_hit"] <= 8
    assert four["experts_hit_if_uniform"] == pytest.approx(8 * (1 - (5 / 8) ** 4))
    assert four["floor_ms"] > one["floor_ms"]


def test_bytes_of_a_step(tiny: TinyModels) -> None:
    from reprise import models
    from reprise.layers import Build
    from reprise.loading import open_checkpoint

    config = open_checkpoint(str(tiny("qwen3_moe").path)).config
    model = models.build(config, Build(torch.float32, torch.device("meta"), 16))
    expert = 4 * 3 * 64 * 32
    every = sum(each.nbytes for each in model.parameters()) - 4 * 160 * 64  # but the embedding
    assert decode_bytes(model, 8) == every
    assert decode_bytes(model, 5) == every - 2 * 3 * expert
    assert decode_bytes(model) == every - 2 * 5 * expert

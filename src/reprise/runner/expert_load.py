"""How many rows each expert of each layer has got, counted on the device."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from reprise.errors import ConfigError
from reprise.layers import Experts
from reprise.ops import OpTable

MEMORY = "expert load"


class ExpertLoad:
    """Counts on, from step to step.

    Counters are memory of ops: a comparison of a graph with eager execution counts its step once.

    Args:
        model: Of whose experts; each tells its counter from now on.
        table: Of the model's ops.
        device: Where it computes.

    Raises:
        ConfigError: It has no experts.
    """

    def __init__(self, model: nn.Module, table: OpTable, device: torch.device) -> None:
        found = [(name, each) for name, each in model.named_modules() if isinstance(each, Experts)]
        if not found:
            raise ConfigError("count_expert_load=True: the model has no experts; leave it out")
        most = max(each.count for _, each in found)
        self._counts = torch.zeros(len(found), most, dtype=torch.int64, device=device)
        table.memory[MEMORY] = self._counts
        table.counters.add(MEMORY)
        self._layers: list[tuple[str, int]] = []
        for number, (name, each) in enumerate(found):
            each.load = (self._counts[number, : each.count],)
            layer = re.search(r"\d+", name)
            self._layers.append((name if layer is None else layer[0], each.count))

    def reset(self) -> None:
        """What was counted so far were no requests'."""
        self._counts.zero_()

    def totals(self) -> Mapping[str, list[int]]:
        """By the layer's number, of each expert the rows; waits for the device."""
        rows = self._counts.tolist()
        return {name: row[:count] for (name, count), row in zip(self._layers, rows, strict=True)}

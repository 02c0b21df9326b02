"""What a contract is: a name, a sentence, and a function that tries it on a platform."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reprise.ops import OpTable
from reprise.platforms import Platform

if TYPE_CHECKING:
    from reprise.llm import LLM

MODELS = Path(__file__).parent / "models"
"""Configs of models that are made up."""
SIDES = (128, 256, 512, 1024, 2048, 4096)
"""Of matrices whose products keep a device busy."""


class Broken(Exception):
    """The platform breaks a contract; the message says how."""


class Skipped(Exception):
    """The contract does not apply here; the message says why."""


Check = Callable[["Kit"], str]
"""Returns a detail worth printing, or raises :class:`Broken` or :class:`Skipped`."""


@dataclass(frozen=True)
class Contract:
    """One thing that every platform must do."""

    name: str
    group: str
    summary: str
    explanation: str
    check: Check


CONTRACTS: dict[str, Contract] = {}
"""Every contract by name, in the order in which they are tried."""


def contract(group: str) -> Callable[[Check], Check]:
    """Declare a contract: the function's name and docstring are its own."""

    def declare(check: Check) -> Check:
        add(check.__name__, group, inspect.getdoc(check) or "", check)
        return check

    return declare


def add(name: str, group: str, text: str, check: Check) -> None:
    """Declare a contract that is not a function of its own, such as one of many ops."""
    summary, _, rest = text.partition("\n")
    CONTRACTS[name] = Contract(name, group, summary.strip(), rest.strip(), check)


def need(holds: object, message: str) -> None:
    """Raise :class:`Broken` with ``message`` unless ``holds``."""
    if not holds:
        raise Broken(message)


class Kit:
    """What contracts work with: a platform, and the demo model and others on it."""

    def __init__(self, platform: Platform, device: str) -> None:
        self.platform = platform
        self.device = device
        """What the user typed after ``--device``."""
        self._models: dict[str, LLM] = {}

    @functools.cached_property
    def ops(self) -> OpTable:
        """What an engine on the platform would call; active, it tells ops which platform it is."""
        return OpTable(self.platform)

    @functools.cached_property
    def llm(self) -> LLM:
        """The demo model, small steps, no graphs."""
        return self._made()

    def model(self, needs: str, options: Mapping[str, Any] | None = None) -> LLM:
        """A model that has what the demo model has not, with random weights; "": the demo model.

        Args:
            needs: A folder of ``models/``: ``experts``, ``states``, ``compressed``.
            options: Further ones of the engine.
        """
        options = dict(options or {})
        if not needs and not options:
            return self.llm
        key = repr((needs, sorted(options.items())))
        if key not in self._models:
            if needs:
                path = str(MODELS / needs)
                options = {"model": path, "load_format": "dummy", "dtype": "float32", **options}
            self._models[key] = self._made(**options)
        return self._models[key]

    def _made(self, **options: Any) -> LLM:
        from reprise import LLM

        small = {
            "device": self.device, "graph_mode": "none", "skip_tokenizer_init": True,
            "max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 129,
            "enable_prefix_caching": False,
        }  # fmt: skip
        return LLM(**{**small, **options})

    def full(self, *shape: int, value: float = 0.0) -> torch.Tensor:
        return torch.full(shape, value, device=self.platform.device)

    def burn(self, rounds: int = 1) -> torch.Tensor:
        """Work that keeps the device busy for a while: about a millisecond a round."""
        return self._products(self._side, rounds)

    def _products(self, side: int, rounds: int) -> torch.Tensor:
        x = torch.ones(side, side, device=self.platform.device)
        for _ in range(4 * rounds):
            x = (x @ x) * (1.0 / side)
        return x

    @functools.cached_property
    def _side(self) -> int:
        """Of matrices that are multiplied: accelerators differ by a factor of a thousand."""
        self._products(SIDES[0], 1)
        return next((side for side in SIDES if self._seconds(side) > 0.8e-3), SIDES[-1])

    def _seconds(self, side: int) -> float:
        """Seconds of one round. The least of three: another program may have the processor."""
        times = []
        for _ in range(3):
            self.platform.synchronize()
            began = time.perf_counter()
            self._products(side, 1)
            self.platform.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    def need_graphs(self) -> None:
        if not self.platform.has_graphs:
            raise Skipped("the platform has no device graphs; every plan resolves to none")

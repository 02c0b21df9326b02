"""Several engines with all weights each, in processes of their own, behind a router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reprise.config import EngineConfig
from reprise.engine import Driver, EngineThread
from reprise.replicas.batch import batch
from reprise.replicas.replicas import Replicas

__all__ = ["Replicas", "batch", "drive"]


def drive(config: EngineConfig, delivered: Callable[[Sequence[Any]], None]) -> Driver:
    """One engine in a thread of this process, or replicas, as the options say.

    Args:
        config: Options.
        delivered: Called behind deliveries with the readers that got something.

    Raises:
        RepriseError: The device, model or options do not work.
    """
    elsewhere = config.computes_elsewhere
    return Replicas(config, delivered) if elsewhere else EngineThread(config, delivered)

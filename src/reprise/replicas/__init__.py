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
    """One engine in a thread of this process, or replicas, as ``data_parallel_size`` says.

    Args:
        config: Options.
        delivered: Called behind deliveries with the readers that got something.

    Raises:
        RepriseError: The device, model or options do not work.
    """
    several = config.data_parallel_size > 1
    return Replicas(config, delivered) if several else EngineThread(config, delivered)

"""What started this process."""

from __future__ import annotations

import os

from reprise.errors import ConfigError


def refuse_launcher(option: str, number: int) -> None:
    """Refuse what starts processes of its own where a launcher has started this one several times:
    each of them would take all devices.

    Args:
        option: The one that asks for several processes.
        number: How many it asks for.

    Raises:
        ConfigError: ``torchrun`` has started more than one process.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and started != "1":
        raise ConfigError(
            f"{option}={number} under torchrun, which has started {started} processes: an engine "
            "starts those of its other devices itself. Start the program once, without torchrun "
            "(torchrun --nproc-per-node 1 will do)"
        )

"""Which devices replicas compute on."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from reprise import platforms
from reprise.config import EngineConfig
from reprise.errors import ConfigError

logger = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"


class Place(NamedTuple):
    """Of one replica."""

    device: str
    variables: dict[str, str]
    """Of its environment."""


def places(config: EngineConfig) -> list[Place]:
    """A device for each of ``data_parallel_size`` replicas: the first ones that the platform sees.
    Host threads are shared out, unless the user has chosen their number.

    Raises:
        ConfigError: ``device`` is a single one, or there are fewer devices than replicas.
        PlatformError: The device is unknown or not on this machine.
    """
    count, (name, _, index) = config.data_parallel_size, config.device.partition(":")
    if index:
        raise ConfigError(
            f"device={config.device!r} is one device and data_parallel_size={count} asks for "
            f"{count}: give device={name!r}"
        )
    platform = platforms.resolve(config.device)
    if platform.is_the_host:
        devices = [platform.name] * count
    else:
        there = platform.device_count()
        if there < count:
            variable = platform.visible_devices_variable
            seen = "" if variable is None else f" (as {variable} says, if it is set)"
            raise ConfigError(
                f"data_parallel_size={count} asks for {count} devices and {there} of platform "
                f"{platform.name!r} can be seen{seen}: give at most {there}"
            )
        devices = [f"{platform.name}:{each}" for each in range(count)]
    variables = {}
    if THREADS in os.environ:
        reason = f"{THREADS}={os.environ[THREADS]}"
    else:
        cpus, limit = platforms.usable_cpus()
        variables[THREADS] = str(max(1, cpus // count))
        reason = f"{cpus} CPUs ({limit}) are shared out: {variables[THREADS]} thread(s) each"
    logger.info("%d replicas on %s; %s", count, ", ".join(devices), reason)
    return [Place(each, variables) for each in devices]

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
    """Where one replica runs."""

    device: str
    variables: dict[str, str]
    """Of its environment."""


def places(config: EngineConfig) -> list[Place]:
    """The first device of each of ``data_parallel_size`` replicas, whose other ranks take those
    behind it: the first ones that the platform sees. Host threads are shared out, unless the user
    has chosen their number.

    Raises:
        ConfigError: ``device`` is a single one, or there are fewer devices than ranks.
        PlatformError: The device is unknown or not on this machine.
    """
    count, each = config.data_parallel_size, config.tensor_parallel_size
    ranks, asked = count * each, f"data_parallel_size={count}"
    if each > 1:
        asked += f" of tensor_parallel_size={each}"
    name, _, index = config.device.partition(":")
    if index:
        raise ConfigError(
            f"device={config.device!r} is one device and {asked} asks for {ranks}: give "
            f"device={name!r}"
        )
    platform = platforms.resolve(config.device)
    if platform.is_the_host:
        devices = [platform.name] * count
    else:
        there = platform.device_count()
        if there < ranks:
            variable = platform.visible_devices_variable
            seen = "" if variable is None else f" (as {variable} says, if it is set)"
            raise ConfigError(
                f"{asked} asks for {ranks} devices and {there} of platform {platform.name!r} can "
                f"be seen{seen}: give at most {there}"
            )
        devices = [f"{platform.name}:{first}" for first in range(0, ranks, each)]
    variables = {}
    if THREADS in os.environ:
        reason = f"{THREADS}={os.environ[THREADS]}"
    else:
        cpus, limit = platforms.usable_cpus()
        variables[THREADS] = str(max(1, cpus // ranks))
        reason = f"{cpus} CPUs ({limit}) are shared out: {variables[THREADS]} thread(s) each"
    beside = f", with {each - 1} further rank(s) each" if each > 1 else ""
    logger.info("%d replicas on %s%s; %s", count, ", ".join(devices), beside, reason)
    return [Place(device, variables) for device in devices]

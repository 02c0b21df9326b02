"""The cluster: connected to or started, what it has, and places in it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from reprise import platforms
from reprise.config import EngineConfig
from reprise.errors import ConfigError, PlatformError, RepriseError, describe
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

SHOW_SECONDS = 10.0
"""Between two lines that say what is waited for."""
_CPU = "CPU"


class Want(NamedTuple):
    """What a rank needs."""

    resource: str
    """As Ray calls it."""
    device: str
    """``--device`` of each rank, where it runs."""
    bundle: dict[str, float]


def require_ray() -> Any:
    """The module.

    Raises:
        ConfigError: It is not installed, or does not import.
    """
    try:
        import ray
        import ray.util  # what follows asks for it by its name
    except Exception as error:  # its libraries may be of another machine
        raise ConfigError(
            f"distributed_executor_backend='ray' needs Ray ({describe(error)}): pip install "
            "'reprise[ray]', on every machine"
        ) from error
    return ray


def connect() -> Any:
    """Join the cluster that ``RAY_ADDRESS`` names, or the one that this machine is a node of; where
    there is none, start one of this machine. It stays until the program ends.

    Returns:
        The module ``ray``.

    Raises:
        ConfigError: Ray is not installed, or ``RAY_ADDRESS`` is a client's.
        RepriseError: The cluster does not answer.
    """
    ray = require_ray()
    version = importlib.metadata.version("ray")
    if ray.is_initialized():
        logger.info("ray %s: this program's connection is used", version)
        return ray
    given = os.environ.get("RAY_ADDRESS", "")
    if "://" in given:
        raise ConfigError(
            f"RAY_ADDRESS={given!r} is a Ray client's: ranks and the program speak to each other "
            "directly, so run it on a node of the cluster, with RAY_ADDRESS=auto"
        )
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": True}
    with _own_signals():
        if given and given != "local":
            try:
                ray.init(address=given, **options)
            except Exception as error:  # Ray raises errors of many types here
                raise RepriseError(
                    f"the Ray cluster at RAY_ADDRESS={given!r} does not answer, see 'ray status': "
                    f"{describe(error)}"
                ) from error
            logger.info("ray %s: joined the cluster at RAY_ADDRESS=%s", version, given)
            return ray
        if not given:
            try:
                ray.init(address="auto", **options)
                logger.info("ray %s: joined the cluster that this machine is a node of", version)
                return ray
            except ConnectionError:
                pass  # there is none, which is told below
        ray.init(address="local", include_dashboard=False, **options)
    logger.warning(
        "ray %s: there is no cluster here and RAY_ADDRESS names none, so one was started of this "
        "machine alone, which ends with this program", version,
    )  # fmt: skip
    return ray


@contextmanager
def _own_signals() -> Iterator[None]:
    """What Ray does with SIGTERM is for programs of its own; this one keeps its handler."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if here else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def wanted(config: EngineConfig, has: Mapping[str, float]) -> Want:
    """What each rank is to get.

    Args:
        config: Options.
        has: The cluster's resources.

    Raises:
        ConfigError: ``device`` is a single one.
        PlatformError: It is unknown.
    """
    name, _, index = config.device.partition(":")
    if index:
        raise ConfigError(
            f"device={config.device!r} is one device, and Ray chooses which each rank gets: give "
            f"device={name!r}"
        )
    resource = _best(has) if name == "auto" else platforms.load(name).cluster_resource
    if resource != _CPU:
        return Want(resource, name, {resource: 1})
    # Ray lets a process compute with as many threads as it has CPUs.
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    count = int(threads) if threads.isdigit() and int(threads) > 0 else 1
    return Want(_CPU, "cpu" if name == "auto" else name, {_CPU: count})


def _best(has: Mapping[str, float]) -> str:
    """The resource of a platform that the cluster has; that of processors if it has no other."""
    known: list[type[Platform]] = []
    for name in platforms.names():
        try:
            known.append(platforms.load(name))
        except PlatformError as error:
            logger.info("%s", error)  # a plug-in that does not import here
    known = [each for each in known if has.get(each.cluster_resource, 0) >= 1]
    return max(known, key=lambda each: each.priority).cluster_resource if known else _CPU


def require_enough(config: EngineConfig, want: Want, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse to begin where there never will be room.

    Args:
        config: Options.
        want: Of each rank.
        nodes: Resources of each node.

    Raises:
        ConfigError: The cluster has too few.
    """
    ranks = config.tensor_parallel_size * config.data_parallel_size
    room = [_fit(each, want) for each in nodes]
    if sum(room) < ranks:
        counts = " + ".join(f"{each.get(want.resource, 0):g}" for each in nodes) or "0"
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} and data_parallel_size="
            f"{config.data_parallel_size} ask for {ranks} ranks of {_shown(want.bundle)} each, and "
            f"the cluster has {counts} {want.resource} on {len(nodes)} node(s), room for "
            f"{sum(room)}: lower them, or add nodes"
        )


def _fit(node: Mapping[str, float], want: Want) -> int:
    """Ranks that a node has room for."""
    return min(int(node.get(name, 0) // count) for name, count in want.bundle.items())


def strategies(config: EngineConfig, want: Want, nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """How the ranks of each replica are placed: on one node where one has room for them.

    Args:
        config: Options.
        want: Of each rank.
        nodes: Unused resources of each node.
    """
    size = config.tensor_parallel_size
    room = [_fit(each, want) for each in nodes]
    found = []
    for _ in range(config.data_parallel_size):
        fitting = [index for index, each in enumerate(room) if each >= size]
        if fitting:
            tightest = min(fitting, key=lambda index: room[index])
            room[tightest] -= size
            found.append("STRICT_PACK")
        else:
            found.append("PACK")
    return found


def alive(ray: Any) -> list[dict[str, Any]]:
    """The cluster's nodes, as Ray describes them."""
    return [each for each in ray.nodes() if each["Alive"]]


def unused(ray: Any) -> list[dict[str, float]]:
    """Resources of each node that are unused at present."""
    from ray._private.state import available_resources_per_node

    known = available_resources_per_node()
    return [known.get(each["NodeID"], {}) for each in alive(ray)]


class Places:
    """Placement groups, one for each replica.

    Args:
        config: Options.
        want: Of each rank.
        ray: The module.

    Raises:
        RepriseError: They are not ready in time; none is left.
    """

    def __init__(self, config: EngineConfig, want: Want, ray: Any) -> None:
        self._ray = ray
        self.groups: list[Any] = []
        chosen = strategies(config, want, unused(ray))
        for index, strategy in enumerate(chosen):
            reason = (
                "one node has room for all of its ranks" if strategy == "STRICT_PACK" else
                "no node has room for all of its ranks, so they are on several"
            )  # fmt: skip
            logger.info(
                "ray: replica %d, %d x %s: %s (%s)", index, config.tensor_parallel_size,
                _shown(want.bundle), strategy, reason,
            )  # fmt: skip
        try:
            for strategy in chosen:
                bundles = [want.bundle] * config.tensor_parallel_size
                self.groups.append(ray.util.placement_group(bundles, strategy=strategy))
            self._wait(config, want)
        except BaseException:
            self.remove()
            raise

    def _wait(self, config: EngineConfig, want: Want) -> None:
        until = time.monotonic() + config.patience
        waiting = list(self.groups)
        while waiting:
            left = until - time.monotonic()
            waiting = [each for each in waiting if not each.wait(min(SHOW_SECONDS, max(0, left)))]
            if not waiting:
                return
            free = sum(each.get(want.resource, 0) for each in unused(self._ray))
            if left <= 0:
                raise RepriseError(
                    f"{len(waiting)} of {len(self.groups)} placement groups of "
                    f"{config.tensor_parallel_size} x {_shown(want.bundle)} were not ready within "
                    f"{config.patience:g} s: {free:g} {want.resource} of the cluster are unused. "
                    "Free some ('ray status' shows who has them), or wait longer with "
                    "distributed_timeout_seconds"
                )
            logger.warning(
                "ray: waiting for room: %d placement group(s) of %d x %s, and %g %s are unused",
                len(waiting), config.tensor_parallel_size, _shown(want.bundle), free, want.resource,
            )  # fmt: skip

    def remove(self) -> None:
        """Give all back."""
        if self._ray.is_initialized():  # else the cluster knows that this program has ended
            for each in self.groups:
                self._ray.util.remove_placement_group(each)
        self.groups = []


def _shown(bundle: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in bundle.items())

"""What is asked of a Ray cluster, and what is refused before it is asked. Needs no Ray."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from reprise import LLM
from reprise.config import EngineConfig
from reprise.engine import Engine
from reprise.errors import ConfigError, PlatformError
from reprise.replicas.ray import cluster
from reprise.replicas.ray.cluster import Want, require_enough, strategies, wanted
from reprise.replicas.ray.fleet import RayFleet

GPU = Want("GPU", "cuda", {"GPU": 1})


def over_ray(tensor: int = 1, data: int = 1, **options: Any) -> EngineConfig:
    return EngineConfig(
        tensor_parallel_size=tensor, data_parallel_size=data, distributed_executor_backend="ray",
        **options,
    )  # fmt: skip


def nodes(*counts: float) -> list[dict[str, float]]:
    return [{"GPU": count, "CPU": 8.0} if count else {"CPU": 8.0} for count in counts]


@pytest.mark.parametrize(
    ("tensor", "data", "counts", "expected"),
    [
        (4, 1, (4,), ["STRICT_PACK"]),
        (4, 1, (2, 2), ["PACK"]),
        (2, 3, (2, 2, 1, 1), ["STRICT_PACK", "STRICT_PACK", "PACK"]),
        (2, 2, (4, 2), ["STRICT_PACK", "STRICT_PACK"]),
        (3, 2, (4, 3), ["STRICT_PACK", "STRICT_PACK"]),
        (2, 1, (0, 0), ["PACK"]),  # it waits for others to end
    ],
)
def test_ranks_are_on_one_node_where_one_has_room(
    tensor: int, data: int, counts: tuple[int, ...], expected: list[str]
) -> None:
    assert strategies(over_ray(tensor, data), GPU, nodes(*counts)) == expected


def test_what_will_never_have_room_is_refused() -> None:
    require_enough(over_ray(2, 2), GPU, nodes(0, 3, 1))
    told = r"ask for 4 ranks of 1 GPU each, and the cluster has 0 \+ 2 \+ 1 GPU on 3 node\(s\)"
    with pytest.raises(ConfigError, match=told):
        require_enough(over_ray(2, 2), GPU, nodes(0, 2, 1))
    # Three halves are no device.
    with pytest.raises(ConfigError, match="room for 0"):
        require_enough(over_ray(1), GPU, nodes(0.5, 0.5, 0.5))


def test_ranks_get_the_devices_that_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert wanted(over_ray(device="auto"), {"CPU": 64.0, "GPU": 8.0}) == ("GPU", "auto", {"GPU": 1})
    assert wanted(over_ray(device="auto"), {"CPU": 64.0}) == ("CPU", "cpu", {"CPU": 1})
    assert wanted(over_ray(device="cuda"), {"CPU": 64.0}) == ("GPU", "cuda", {"GPU": 1})
    for threads, count in (("6", 6), ("4,2", 4), ("0", 1), ("many", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert wanted(over_ray(device="cpu"), {"GPU": 8.0}) == ("CPU", "cpu", {"CPU": count})


def test_one_device_by_its_index_is_refused() -> None:
    with pytest.raises(ConfigError, match="give device='cuda'"):
        wanted(over_ray(device="cuda:1"), {"GPU": 8.0})
    with pytest.raises(PlatformError, match="unknown"):
        wanted(over_ray(device="abacus"), {})


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'reprise\[ray\]'"):
        LLM(distributed_executor_backend="ray")


def test_a_clients_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ModuleType("ray")
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setattr(cluster, "require_ray", lambda: ray)
    monkeypatch.setattr(cluster.importlib.metadata, "version", lambda name: "2")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="run it on a node of the cluster"):
        cluster.connect()


def test_options() -> None:
    assert EngineConfig(distributed_executor_backend=None).distributed_executor_backend == "mp"
    assert EngineConfig(distributed_executor_backend="uni").distributed_executor_backend == "mp"
    with pytest.raises(ConfigError, match="contradict each other"):
        EngineConfig(distributed_executor_backend="uni", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="must be one of mp, ray"):
        EngineConfig(distributed_executor_backend="external_launcher")
    for seconds in (0, -1, float("nan"), True, "10"):
        with pytest.raises(ConfigError, match="distributed_timeout_seconds"):
            EngineConfig(distributed_timeout_seconds=seconds)
    with pytest.raises(ConfigError, match="distributed_executor_backend='ray': an Engine is in"):
        Engine(over_ray())


def test_a_replica_that_hangs_is_named_with_what_the_other_says() -> None:
    """It says nothing itself; whoever waited for it has ended, and says why."""

    def replica(index: int, first: int | None, told: str) -> SimpleNamespace:
        return SimpleNamespace(
            index=index, first_failure=first, ended=lambda: f"replica {index} {told}"
        )

    waited = "was ended: rank 1 did not answer within 300 s"
    replicas = [replica(0, 1, waited), replica(1, None, "hangs"), replica(2, 2, "was ended: why")]
    fleet: Any = SimpleNamespace(replicas=replicas)
    told = [RayFleet.ended(fleet, each) for each in replicas]  # type: ignore[arg-type]
    assert told == [f"replica 1 hangs; replica 0 {waited}", "replica 1 hangs",
                    "replica 2 was ended: why"]  # fmt: skip

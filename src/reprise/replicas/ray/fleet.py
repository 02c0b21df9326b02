"""Replicas as actors of a Ray cluster, one for each rank."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from reprise.actor import Actor
from reprise.config import EngineConfig
from reprise.distributed import Host
from reprise.errors import RepriseError, RequestError, describe, named
from reprise.parallel.followers import SILENT_SECONDS
from reprise.parallel.remote import Rank
from reprise.parallel.remote_seat import RemoteTable
from reprise.processes.channel import Channel
from reprise.processes.sealed import Sealed, new_secret
from reprise.processes.sealed import connect as connect_sealed
from reprise.replicas.ray.cluster import Places, Want, alive, connect, require_enough, wanted
from reprise.replicas.ray.rank import BEAT, FAILED, READY, STOP, EngineEnded
from reprise.replicas.ray.service import sealed_channel
from reprise.replicas.replica import POLL_SECONDS, Fleet, Heard, Replica, await_ready

logger = logging.getLogger(__name__)

RANK = "reprise.replicas.ray.rank:RankProcess"
CONNECT_SECONDS = 60.0
"""For rank 0, which runs, to answer."""
REASON_SECONDS = 3.0
"""For Ray to say why an actor has ended."""
INHERITED = (
    "REPRISE_", "NCCL_", "RCCL_", "CCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_", "CUBLAS_",
    "HF_", "HUGGING_FACE_", "TRANSFORMERS_",
)  # fmt: skip
"""Beginnings of names of variables that ranks get from the program, where their hosts have none."""
_numbers = itertools.count()


def inherited() -> dict[str, str]:
    """Variables for ranks. They are told to each process and stand in no description of an actor:
    a token of the Hugging Face hub is one."""
    found = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
    if found:
        logger.info("ray: ranks get these variables: %s", ", ".join(sorted(found)))
    return found


class RayFleet(Fleet):
    """All replicas.

    Args:
        config: Options of all.

    Raises:
        RepriseError: The cluster has no room, or one could not start: what it said. No actor and no
            placement group is left.
    """

    def __init__(self, config: EngineConfig) -> None:
        ray = connect()
        nodes = [each["Resources"] for each in alive(ray)]
        want = wanted(config, ray.cluster_resources())
        require_enough(config, want, nodes)
        self._places = Places(config, want, ray)
        self.replicas: list[RayReplica] = []
        try:
            actors = [_actors(ray, group, want) for group in self._places.groups]
            self.replicas += [
                RayReplica(index, config, mine, ray) for index, mine in enumerate(actors)
            ]
            for each in self.replicas:
                each.place(want.device)
            table = None
            if config.enable_expert_parallel and len(self.replicas) > 1:
                table = self.replicas[0].keep_table([each.hosts for each in self.replicas])
            for each in self.replicas:
                each.start(table)
            await_ready(self)
        except BaseException as error:
            self.end()
            self.remove()
            if isinstance(error, ray.exceptions.RayError):
                raise RepriseError(f"ray: {reason_of(error)}") from error
            raise

    def ended(self, replica: Replica) -> str:
        """Of those that share experts another one may be the reason, by what this one says: it was
        ended, or hangs, and then says nothing itself."""
        first = self.replicas[replica.index].first_failure
        told = replica.ended()
        if first is None or first == replica.index:
            return told
        return f"{self.replicas[first].ended()}; {told}"

    def remove(self) -> None:
        self._places.remove()

    def end(self) -> None:
        super().end()
        self._places.remove()


def _actors(ray: Any, group: Any, want: Want) -> list[Any]:
    """One for each bundle of a placement group. What has ended is not started again."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    others = {k: v for k, v in want.bundle.items() if k not in ("CPU", "GPU")}
    level = logging.getLogger("reprise").getEffectiveLevel()
    variables = inherited()
    found = []
    for index in range(len(group.bundle_specs)):
        options = {
            "num_cpus": want.bundle.get("CPU", 0), "num_gpus": want.bundle.get("GPU", 0),
            "resources": others, "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        }  # fmt: skip
        found.append(ray.remote(**options)(Actor).remote(variables, RANK, level))
    return found


class RayReplica(Replica):
    """One engine, whose ranks are actors; the first of them speaks for it.

    Args:
        index: Among all.
        config: Of all.
        actors: One for each rank, in any order.
        ray: The module.
    """

    def __init__(self, index: int, config: EngineConfig, actors: Sequence[Any], ray: Any) -> None:
        super().__init__(index, "not placed yet", "none")
        self._config, self._ray = config, ray
        self._actors = list(actors)
        self._ranks: list[Rank] = []
        self._runs: list[Any] = []
        """Of each rank, what Ray will say of its end."""
        self._ready = False
        self._secret = new_secret()
        self._control: Sealed | None = None

    def place(self, device: str) -> None:
        """Learn where the ranks are, and let the first of them listen.

        Args:
            device: ``--device`` of each.

        Raises:
            RepriseError: One could not begin.
        """
        self._ranks = ranks = self._placed(device)
        self.device = ", ".join(f"{each.device} on {each.host.address}" for each in ranks)
        self.log = ranks[0].log
        self._place = self._answer([self._actors[0].call.remote("listen", self._secret)])[0]

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Hosts of the ranks, in their order."""
        return tuple(each.host for each in self._ranks)

    def keep_table(self, hosts: Sequence[tuple[Host, ...]]) -> RemoteTable:
        """Have engines that share experts meet at the first rank of this one.

        Args:
            hosts: Of each engine's ranks.

        Raises:
            RepriseError: It could not.
        """
        (port,) = self._answer([self._actors[0].call.remote("keep_store")])
        group = f"data-{os.getpid()}-{next(_numbers)}"
        return RemoteTable(
            tuple(hosts), self._place, self._secret, group, port, self._config.patience
        )

    def start(self, table: RemoteTable | None) -> None:
        """Let the ranks begin, which goes on beside.

        Args:
            table: The engines that share experts; None: this one knows no other.
        """
        ranks, size = self._ranks, len(self._ranks)
        leader = self._actors[0]
        own = self._config.replace(
            data_parallel_size=1, distributed_executor_backend="mp", device=ranks[0].device
        )
        self._runs = [leader.call.remote("lead", own.arguments(), ranks, table, self.index)]
        self._runs += [
            actor.call.remote("follow", self._place, self._secret, rank, size, table, self.index)
            for rank, actor in enumerate(self._actors[1:], 1)
        ]
        self._control = connect_sealed(self._place, "control", self._secret, CONNECT_SECONDS)
        self._beat = self._looked_at = time.monotonic()

    def _placed(self, device: str) -> list[Rank]:
        """Where actors are; they are put in the order of ranks: those of a node one after the
        other, and those of this node first, so that what the program says has a short way."""
        places: list[Rank] = self._answer(
            [each.call.remote("place", device) for each in self._actors]
        )
        here = self._ray.get_runtime_context().get_node_id()
        nodes = [each.host.name for each in places]
        order = sorted(
            range(len(places)), key=lambda i: (nodes[i] != here, nodes.index(nodes[i]), i)
        )
        self._actors = [self._actors[i] for i in order]
        ranks = [places[i] for i in order]
        for rank, each in enumerate(ranks):
            logger.info("ray: %s, rank %d: %s, %s", self.name, rank, each.device, each.process)
        return ranks

    def _answer(self, asked: Sequence[Any]) -> list[Any]:
        """What actors say.

        Raises:
            RepriseError: One cannot say it, or says nothing in time.
        """
        try:
            return list(self._ray.get(list(asked), timeout=self._config.patience))
        except self._ray.exceptions.GetTimeoutError:
            raise RepriseError(
                f"{self.name}: its actors did not begin within {self._config.patience:g} s; see "
                "'ray status' and 'ray logs', or wait longer with distributed_timeout_seconds"
            ) from None
        except self._ray.exceptions.RayError as error:
            told = getattr(error, "cause", None)
            if isinstance(told, RepriseError):
                raise named(type(told).__name__, f"{self.name}: {told}") from None
            raise RepriseError(
                f"{self.name}: an actor could not begin: {reason_of(error)}. Reprise, torch and "
                "the model have to be on every node, alike"
            ) from None

    @property
    def control(self) -> socket.socket:
        assert self._control is not None
        return self._control.connection

    def hear(self) -> Heard:
        assert self._control is not None
        try:
            word = self._control.receive()
        except (OSError, EOFError):
            return Heard.GONE
        self._beat = time.monotonic()
        if word == READY:
            self._ready = True
            return Heard.READY
        if word[:1] == FAILED:
            kind, message = json.loads(word[1:])
            raise named(kind, f"{self.name} ({self.device}): {message}")
        assert word == BEAT, word
        return Heard.NOTHING

    def channel(self, watch: Callable[[Channel], None]) -> Channel:
        data = connect_sealed(self._place, "data", self._secret, CONNECT_SECONDS)
        return sealed_channel(data, watch)

    def stop(self) -> None:
        assert self._control is not None
        with contextlib.suppress(OSError):  # it has ended, which is noticed elsewhere
            self._control.send(STOP)

    def end(self, seconds: float) -> None:
        if self._runs and self._ray.is_initialized():
            self._ray.wait(self._runs, num_returns=len(self._runs), timeout=seconds)
        self.kill()

    def kill(self) -> None:
        actors, self._actors = self._actors, []
        if self._ray.is_initialized():  # else the cluster knows that this program has ended
            for each in actors:
                self._ray.kill(each, no_restart=True)
        if self._control is not None:
            self._control.close()

    def lost(self) -> str | None:
        now = time.monotonic()
        gap, self._looked_at = now - self._looked_at, now
        if gap > 2 * POLL_SECONDS + 1:
            self._beat = now  # it is this process that has not looked
        if now - self._beat > SILENT_SECONDS:
            self.kill()
            return self._last_words(f"has not run for {SILENT_SECONDS:.0f} s, and was ended")
        if not self._ready:
            for rank, run in enumerate(self._runs[1:], 1):
                why = self._end_of(run, 0.0)
                if why is not None:
                    self.kill()
                    return self._last_words(f"did not start: rank {rank} ended: {why}")
        return None

    def ended(self) -> str:
        why = self._end_of(self._runs[0], REASON_SECONDS)
        self.kill()
        nothing = "it says nothing, for it hangs, or its process or its node is gone"
        return self._last_words(f"was ended: {why or nothing}")

    @property
    def first_failure(self) -> int | None:
        """Of engines that share experts the one that failed first, by what this one says, which has
        ended; None: it says nothing."""
        if not self._ray.is_initialized():
            return None
        errors = self._ray.exceptions
        try:
            self._ray.get(self._runs[0], timeout=REASON_SECONDS)
        except errors.RayError as error:
            told = getattr(error, "cause", None)
            return told.engine if isinstance(told, EngineEnded) else None
        return None

    def forget(self) -> None:
        self._actors = []
        self.control.close()

    def give_file(self, descriptor: int) -> None:
        raise RequestError(
            "update_weights with distributed_executor_backend='ray' is not supported: create a new "
            "engine"
        )

    def _end_of(self, run: Any, seconds: float) -> str | None:
        """How a rank has ended; None: it has not, as far as Ray knows."""
        if not self._ray.is_initialized():
            return "this program has left the cluster"
        errors = self._ray.exceptions
        try:
            self._ray.get(run, timeout=seconds)
        except (errors.GetTimeoutError, errors.ActorUnavailableError):
            return None
        except errors.RayError as error:
            return reason_of(error)
        return "it left" if self._ready else None  # it has told rank 0 why

    def _last_words(self, what: str) -> str:
        return f"{self.name} ({self.device}) {what}; its log: {self.log}"


def reason_of(error: BaseException) -> str:
    """What Ray says of an end, without what it adds for its own developers."""
    told = getattr(error, "cause", None)
    if isinstance(told, RepriseError):
        return str(told)
    if told is not None:
        return describe(told)
    lines = [each.strip() for each in str(error).splitlines() if each.strip()]
    plain = [each for each in lines if not each.startswith(("class_name:", "actor_id:", "pid:",
             "namespace:", "ip:", "name:"))]  # fmt: skip
    return " ".join(plain[:3]) or repr(error)

"""A program's side of its replicas: what any thread may ask of them."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import torch

from reprise.config import EngineConfig
from reprise.distributed import ALONE, Group
from reprise.engine import Admit, Engine, Frontend, Reader
from reprise.engine.detokenizer import TokenTexts
from reprise.engine.driver import gather, refuse
from reprise.engine.frontend import load_tokenizer
from reprise.engine.prompt import PreparedPrompt, check_fits
from reprise.engine.submission import PreparedParams, truncated, whole_priority
from reprise.engine.tokenizing import Tokenizing
from reprise.errors import ConfigError, describe, ordinary
from reprise.loading import NamedTensors, checkpoint_of
from reprise.processes import wire
from reprise.processes.launched import refuse_launcher
from reprise.replicas.deliveries import Deliveries
from reprise.replicas.outstanding import Outstanding
from reprise.replicas.replica import Fleet
from reprise.replicas.request import Request
from reprise.replicas.router import Router
from reprise.replicas.weights import write_weights
from reprise.replicas.wires import Wires
from reprise.runner.model_choices import refuse_unshared, shape_of
from reprise.sampling_params import SamplingParams

T = TypeVar("T")

logger = logging.getLogger(__name__)

FLEETS = {
    "mp": "reprise.replicas.launch:LocalFleet",
    "ray": "reprise.replicas.ray.fleet:RayFleet",
}
"""By ``distributed_executor_backend``; imported when one is wanted."""


def launch(config: EngineConfig) -> Fleet:
    """Start all replicas side by side, and wait until every engine is ready.

    Raises:
        RepriseError: One could not start: what it said. No process is left.
    """
    module, _, name = FLEETS[config.distributed_executor_backend].partition(":")
    found: Fleet = getattr(importlib.import_module(module), name)(config)
    return found


class Replicas:
    """Drives several engines. A thread reads what they send, others tokenize.

    Args:
        config: Options, of all.
        delivered: Called behind deliveries with the readers that got something.

    Raises:
        RepriseError: The devices, model or options do not work; no process is left.
    """

    def __init__(self, config: EngineConfig, delivered: Callable[[Sequence[Any]], None]) -> None:
        refuse_launcher("data_parallel_size", config.data_parallel_size)
        checkpoint = checkpoint_of(config)
        in_step = config.enable_expert_parallel and config.data_parallel_size > 1
        if in_step:  # before any process is started
            ranks = config.tensor_parallel_size
            own = Group("tensor", 0, ranks) if ranks > 1 else ALONE
            everyone = Group("data", 0, config.data_parallel_size)
            shape_of(checkpoint.config, torch.bfloat16, own, everyone)
            refuse_unshared(config)
        tokenizer = load_tokenizer(config, checkpoint)
        self._num_added = 0
        self._fleet = launch(config)
        self._replicas = self._fleet.replicas
        try:
            self._wires = Wires(self._fleet)
            facts = self._wires.greetings()
        except BaseException:
            self._fleet.end()
            self._fleet.remove()
            raise
        first = facts[0]
        resolved: EngineConfig = first["config"]
        self.frontend = Frontend(
            resolved.replace(
                device=config.device,
                data_parallel_size=config.data_parallel_size,
                distributed_executor_backend=config.distributed_executor_backend,
            ),
            tokenizer,
            checkpoint.generation_config,
            first["vocab_size"],
            min(each["max_model_len"] for each in facts),
            tuple(each["device"] for each in facts),
        )
        self._capacity = min(each["capacity"] for each in facts)
        size = first["block_size"] if resolved.enable_prefix_caching else 0
        blocks = [each["num_blocks"] for each in facts]
        self.router = Router(size, blocks, resolved.max_num_seqs)
        self._outstanding = Outstanding(self.router)
        text_of = None if tokenizer is None else TokenTexts(tokenizer).of
        self._deliveries = Deliveries(
            self._outstanding, self._replicas, text_of, in_step, delivered
        )
        logger.info(
            "%d replica(s) ready, after %s s", len(facts),
            ", ".join(f"{each['startup_seconds']:.2f}" for each in facts),
        )  # fmt: skip
        self._tokenizing = Tokenizing()
        self._thread = threading.Thread(target=self._loop, name="reprise-replicas", daemon=True)
        _living.add(self)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """No engine is in this process.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"engine: with data_parallel_size={len(self._replicas)} and "
            f"distributed_executor_backend={self.frontend.config.distributed_executor_backend!r} "
            "each one is in a process of its own; ask by stats(), get_metrics() and graph_report()"
        )

    def submit(
        self,
        request_id: str,
        prompt: Callable[[], Any] | PreparedPrompt,
        params: SamplingParams | PreparedParams | None,
        priority: int,
        reader: Reader,
        admit: Admit | None = None,
        *,
        long: bool = False,
    ) -> Future[Any]:
        """As of :class:`reprise.engine.Driver`."""
        accepted: Future[Any] = Future()
        outstanding = self._outstanding

        def prepare() -> None:
            if not outstanding.is_preparing(reader):
                return  # it has left
            try:
                accepted_params = self.prepare_params(params)
                urgency = whole_priority(priority)
                given = prompt if isinstance(prompt, PreparedPrompt) else prompt()
                prepared = self.prepare(request_id, given, accepted_params), accepted_params
                with outstanding.open():
                    if admit is not None:
                        admit(*prepared, outstanding.num_waiting_tokens)
                    aborted = outstanding.prepared(reader)
                    self.send([Request(request_id, *prepared, urgency, reader, accepted)])
                if aborted:
                    self.abort(request_id)
            except BaseException as error:
                outstanding.prepared(reader)
                refuse(accepted, ordinary(error))
                if not isinstance(error, Exception):
                    raise

        with outstanding.open():
            outstanding.prepare(reader, request_id)
            ready = isinstance(prompt, PreparedPrompt) and isinstance(params, PreparedParams)
            if not ready:
                self._tokenizing.submit(prepare, long)
        if ready:
            prepare()
        return accepted

    def between_steps(self, function: Callable[[], None], *, more: bool = False) -> None:
        """As of :class:`reprise.engine.Driver`; there are no steps in this process."""
        function()

    def prepare_params(self, params: SamplingParams | PreparedParams | None) -> PreparedParams:
        """Check parameters, as far as that can be done here.

        Raises:
            RequestError: They are invalid.
        """
        return self.frontend.prepare_params(params)

    def prepare(self, request_id: str, prompt: Any, params: PreparedParams) -> PreparedPrompt:
        """Check a prompt.

        Raises:
            RequestError: It is invalid.
            CapacityError: It does not fit the context or the cache.
        """
        found = self.frontend.prepare(prompt)
        most = min(self.frontend.max_model_len, self._capacity + 1)
        ids = truncated(found.token_ids, params.params, most)
        check_fits(request_id, len(ids), self.frontend.max_model_len, self._capacity)
        return found if ids is found.token_ids else replace(found, token_ids=ids)

    def send(self, requests: Sequence[Request]) -> None:
        """Have requests computed, each by the replica that the router chooses; those of one replica
        begin together.

        Raises:
            RequestError: The name of one is another's, which is unfinished; none is sent.
            RepriseError: There are no replicas any more.
        """
        by_replica: dict[int, list[wire.Generate]] = {}
        with self._outstanding.open():
            self._outstanding.refuse_known([each.request_id for each in requests])
            for each in requests:
                route = self._outstanding.add(each)
                prompt, params = each.prepared
                message = wire.Generate(
                    each.number, each.request_id, prompt, None, params, each.priority, each.wants,
                    self._num_added,
                )  # fmt: skip
                self._num_added += 1
                by_replica.setdefault(route.replica, []).append(message)
            for replica, messages in by_replica.items():
                self._wires.channels[replica].send(messages)

    def ask(self, name: str, *arguments: Any) -> Future[list[Any]]:
        """As of :class:`reprise.engine.Driver`."""
        if name == "update_weights":
            return self._update_weights(*arguments)
        answers = [
            self._ask(index, name, {"arguments": arguments}) for index in range(len(self._replicas))
        ]
        if name == "reset_prefix_cache":
            with self._outstanding.lock:
                self.router.forget()
        return gather(answers)

    def _ask(self, index: int, what: str, arguments: dict[str, Any]) -> Future[Any]:
        with self._outstanding.open():
            number, answer = self._outstanding.ask()
            self._wires.channels[index].send(wire.Call(number, what, arguments))
        return answer

    def _update_weights(self, weights: NamedTensors) -> Future[list[Any]]:
        file, index = write_weights(weights)
        with file:
            for replica in self._replicas:
                replica.give_file(file.fileno())
            with self._outstanding.lock:
                self.router.forget()
            return gather(
                [
                    self._ask(each, "update_weights", {"arguments": (index,)})
                    for each in range(len(self._replicas))
                ]
            )

    def tokenize(self, function: Callable[[], T], *, long: bool = False) -> Future[T]:
        """As of :class:`reprise.engine.Driver`."""
        with self._outstanding.open():
            return self._tokenizing.submit(function, long)

    def abort(self, request_id: str) -> Future[None]:
        """As of :class:`reprise.engine.Driver`."""
        with self._outstanding.lock:
            self._outstanding.abort_prepared(request_id)
            request = self._outstanding.named(request_id)
        if request is None or request.route is None:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._ask(request.route.replica, "abort", {"number": request.number})

    def leave(self, request_id: str, reader: Reader) -> None:
        """As of :class:`reprise.engine.Driver`."""
        with self._outstanding.lock:
            self._outstanding.prepared(reader)
            request = self._outstanding.named(request_id)
            if request is None or request.reader is not reader:
                return  # a later request may have the same id
            route = self._outstanding.forget(request)
            self._wires.channels[route.replica].send(wire.Leave(request.number))

    @property
    def num_waiting(self) -> int:
        """As of :class:`reprise.engine.Driver`: those of which no token has come."""
        return self._outstanding.num_waiting

    @property
    def closed(self) -> str | None:
        """As of :class:`reprise.engine.Driver`."""
        return self._outstanding.closed

    def shutdown(self) -> None:
        """Abort all requests, and end the replicas."""
        with self._outstanding.lock:
            if self._outstanding.closed is None:
                self._outstanding.closed = "the engine was shut down; create a new one"
                self._wires.stop()
        self._tokenizing.shutdown()
        self._thread.join()

    def drop(self) -> None:
        """As of :class:`reprise.engine.Driver`."""
        if self._outstanding.closed is None:
            self._wires.stop()

    def join(self) -> None:
        """Wait for the end of all replicas."""
        self._thread.join()

    def _loop(self) -> None:
        """The loop of the thread that reads."""
        try:
            lost = self._wires.serve(self._deliveries.hear, self._deliveries.flush)
        except BaseException as error:
            logger.critical("the thread that reads from replicas ended", exc_info=True)
            lost = f"the thread that reads from replicas ended ({describe(error)})"
        if lost is not None:
            logger.critical("%s", lost)
            lost = f"{lost}. All requests have ended, and the other replicas with them"
        self._outstanding.close(lost or self._outstanding.closed or "")
        self._fleet.end()
        if lost is None:
            self._fleet.remove()
        self._wires.close()

    def forked(self) -> None:
        """This process was forked, and the replicas belong to its parent."""
        self._wires.forked()
        self._outstanding.forked(
            "this process was forked and the replicas belong to its parent; create the LLM in the "
            "process that uses it"
        )


_living: weakref.WeakSet[Replicas] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_living):
        each.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

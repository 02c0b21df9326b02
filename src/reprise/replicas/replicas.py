"""A program's side of its replicas: it tokenizes, chooses, sends, and hands on what comes back."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch

from reprise.config import EngineConfig
from reprise.distributed import ALONE, Group
from reprise.engine import Admit, Engine, Frontend, Reader
from reprise.engine.detokenizer import TokenTexts
from reprise.engine.driver import gather, refuse, settle
from reprise.engine.frontend import load_tokenizer
from reprise.engine.prompt import PreparedPrompt, check_fits
from reprise.engine.submission import PreparedParams, truncated
from reprise.errors import (
    ConfigError,
    FailedRequestError,
    RanksError,
    RepriseError,
    RequestError,
    StepError,
    describe,
    named,
)
from reprise.loading import NamedTensors, checkpoint_of
from reprise.outputs import RequestMetrics, RequestOutput
from reprise.processes import wire
from reprise.processes.channel import Channel
from reprise.processes.launched import refuse_launcher
from reprise.processes.waker import Waker
from reprise.replicas.deltas import unpack
from reprise.replicas.replica import POLL_SECONDS, Fleet, Heard, Replica
from reprise.replicas.router import Route, Router
from reprise.replicas.weights import write_weights
from reprise.runner.model_choices import refuse_unshared, shape_of
from reprise.sampling_params import SamplingParams

T = TypeVar("T")

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""For replicas to free their devices."""


class Request:
    """What is known of an unfinished request. As an :class:`reprise.engine.Acceptance` it tells
    readers what was accepted."""

    def __init__(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        params: PreparedParams,
        priority: int,
        reader: Reader,
        accepted: Future[Any] | None = None,
        whole: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt.text
        self.prompt_token_ids = prompt.token_ids
        self.params = params.params
        self.prepared = prompt, params
        self.priority = priority
        self.wants = ["whole"] if whole else []
        self.reader = reader
        self.number = 0
        self.route: Route | None = None
        self.future: Future[Any] = Future() if accepted is None else accepted
        """Done when the replica has it."""
        self.waits = True
        """Nothing of it has been generated."""
        self.metrics: RequestMetrics | None = None
        self.output: list[int] = []
        """Of its only completion, for what the replica then has in its cache."""
        self.held: RequestOutput | None = None
        """What the reader did not want yet."""


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
    """Drives several engines. A thread reads what they send, another one tokenizes.

    Args:
        config: Options, of all.
        delivered: Called behind deliveries with the readers that got something.

    Raises:
        RepriseError: The devices, model or options do not work; no process is left.
    """

    def __init__(self, config: EngineConfig, delivered: Callable[[Sequence[Any]], None]) -> None:
        refuse_launcher("data_parallel_size", config.data_parallel_size)
        checkpoint = checkpoint_of(config)
        self._in_step = config.enable_expert_parallel and config.data_parallel_size > 1
        """They share experts: one that has lost the others ends."""
        if self._in_step:  # before any process is started
            ranks = config.tensor_parallel_size
            own = Group("tensor", 0, ranks) if ranks > 1 else ALONE
            everyone = Group("data", 0, config.data_parallel_size)
            shape_of(checkpoint.config, torch.bfloat16, own, everyone)
            refuse_unshared(config)
        tokenizer = load_tokenizer(config, checkpoint)
        self._delivered = delivered
        self._closed: str | None = None
        self._stopping = False
        self._deadline = 0.0
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._names: dict[str, int] = {}
        self._preparing: dict[Reader, tuple[str, bool]] = {}
        """Request ids of those that are being tokenized, and whether they were aborted."""
        self._asked: dict[int, tuple[int, Future[Any]]] = {}
        """Questions by number: whose answer is awaited."""
        self._num_added = 0
        self._fleet = launch(config)
        self._replicas = self._fleet.replicas
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker.receiver, selectors.EVENT_READ, None)
        self._to_watch: list[Channel] = []
        try:
            self._channels = [self._connect(each) for each in self._replicas]
            facts = [self._greeted(index) for index in range(len(self._channels))]
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
        self._text_of = None if tokenizer is None else TokenTexts(tokenizer).of
        size = first["block_size"] if resolved.enable_prefix_caching else 0
        self.router = Router(size, [each["num_blocks"] for each in facts])
        logger.info(
            "%d replica(s) ready, after %s s", len(facts),
            ", ".join(f"{each['startup_seconds']:.2f}" for each in facts),
        )  # fmt: skip
        self._tokenizing = ThreadPoolExecutor(1, "reprise-tokenizer")
        self._thread = threading.Thread(target=self._loop, name="reprise-replicas", daemon=True)
        _living.add(self)
        self._thread.start()

    def _connect(self, replica: Replica) -> Channel:
        channel = replica.channel(self._watch)
        self._selector.register(channel.connection, selectors.EVENT_READ, (replica, channel))
        self._selector.register(replica.control, selectors.EVENT_READ, (replica, None))
        return channel

    def _greeted(self, index: int) -> dict[str, Any]:
        """What a replica says first."""
        channel, replica = self._channels[index], self._replicas[index]
        while True:
            received = channel.connection.recv(1 << 16)
            if not received:
                raise RepriseError(f"{replica.ended()}. No replica was started")
            for message in channel.frames.feed(received):
                channel.connection.setblocking(False)
                facts: dict[str, Any] = message.facts
                return facts

    @property
    def engine(self) -> Engine:
        """None of this process.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"engine: with data_parallel_size={len(self._replicas)} and "
            f"distributed_executor_backend={self.frontend.config.distributed_executor_backend!r} "
            "each one is in a process of its own; ask by stats(), get_metrics() and graph_report()"
        )

    # ---- any thread ------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt: Callable[[], Any],
        params: SamplingParams | None,
        priority: int,
        reader: Reader,
        admit: Admit | None = None,
    ) -> Future[Any]:
        """As of :class:`reprise.engine.Driver`."""
        accepted: Future[Any] = Future()

        def prepare() -> None:
            if reader not in self._preparing:
                return  # it has left
            try:
                accepted_params = self.prepare_params(params)
                prepared = self.prepare(request_id, prompt(), accepted_params), accepted_params
                with self._open():
                    if admit is not None:
                        admit(*prepared, self._waiting_tokens())
                    _, aborted = self._preparing.pop(reader, (request_id, False))
                    self.send([Request(request_id, *prepared, priority, reader, accepted)])
                if aborted:
                    self.abort(request_id)
            except Exception as error:
                with self._lock:
                    self._preparing.pop(reader, None)
                refuse(accepted, error)

        with self._open():
            self._preparing[reader] = (request_id, False)
            self._tokenizing.submit(prepare)
        return accepted

    def prepare_params(self, params: SamplingParams | None) -> PreparedParams:
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
        with self._open():
            for each in requests:
                if each.request_id in self._names:
                    raise RequestError(
                        f"request_id={each.request_id!r} is already running; give a new one"
                    )
            for each in requests:
                prompt, params = each.prepared
                route = self.router.choose(
                    prompt.token_ids, prompt.cache_salt, params.params.n, params.params.max_tokens
                )
                each.number, each.route = next(self._numbers), route
                self._requests[each.number] = each
                self._names[each.request_id] = each.number
                message = wire.Generate(
                    each.number, each.request_id, prompt, None, params, each.priority, each.wants,
                    self._num_added,
                )  # fmt: skip
                self._num_added += 1
                by_replica.setdefault(route.replica, []).append(message)
            for replica, messages in by_replica.items():
                self._channels[replica].send(messages)

    def ask(self, name: str, *arguments: Any) -> Future[list[Any]]:
        """As of :class:`reprise.engine.Driver`."""
        if name == "update_weights":
            return self._update_weights(*arguments)
        answers = [
            self._ask(index, name, {"arguments": arguments}) for index in range(len(self._replicas))
        ]
        if name == "reset_prefix_cache":
            with self._lock:
                self.router.forget()
        return gather(answers)

    def _ask(self, index: int, what: str, arguments: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._open():
            number = next(self._numbers)
            self._asked[number] = index, future
            self._channels[index].send(wire.Call(number, what, arguments))
        return future

    def _update_weights(self, weights: NamedTensors) -> Future[list[Any]]:
        file, index = write_weights(weights)
        with file:
            for replica in self._replicas:
                replica.give_file(file.fileno())
            with self._lock:
                self.router.forget()
            return gather(
                [
                    self._ask(each, "update_weights", {"arguments": (index,)})
                    for each in range(len(self._replicas))
                ]
            )

    def tokenize(self, function: Callable[[], T]) -> Future[T]:
        """As of :class:`reprise.engine.Driver`."""
        with self._open():
            return self._tokenizing.submit(function)

    def abort(self, request_id: str) -> Future[None]:
        """As of :class:`reprise.engine.Driver`."""
        with self._lock:
            for reader, (name, _) in self._preparing.items():
                if name == request_id:
                    self._preparing[reader] = (name, True)
            request = self._requests.get(self._names.get(request_id, 0))
        if request is None or request.route is None:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._ask(request.route.replica, "abort", {"number": request.number})

    def leave(self, request_id: str, reader: Reader) -> None:
        """As of :class:`reprise.engine.Driver`."""
        with self._lock:
            self._preparing.pop(reader, None)
            request = self._requests.get(self._names.get(request_id, 0))
            if request is None or request.reader is not reader:
                return  # a later request may have the same id
            route = self._forget(request)
            self._channels[route.replica].send(wire.Leave(request.number))

    @property
    def num_waiting(self) -> int:
        """As of :class:`reprise.engine.Driver`: those of which no token has come."""
        with self._lock:
            waiting = [each for each in self._requests.values() if each.waits]
            return len(self._preparing) + sum(each.params.n for each in waiting)

    def _waiting_tokens(self) -> int:
        waiting = [each for each in self._requests.values() if each.waits]
        return sum(len(each.prompt_token_ids) * each.params.n for each in waiting)

    @property
    def closed(self) -> str | None:
        """As of :class:`reprise.engine.Driver`."""
        return self._closed

    def shutdown(self) -> None:
        """Abort all requests, and end the replicas."""
        with self._lock:
            if self._closed is None:
                self._closed = "the engine was shut down; create a new one"
                self._stopping = True
                self._deadline = time.monotonic() + STOP_SECONDS
                for each in self._replicas:
                    each.stop()
        self._waker.wake()
        self._tokenizing.shutdown(wait=False)
        self._thread.join()

    def join(self) -> None:
        """Wait for the end of all replicas."""
        self._thread.join()

    def _watch(self, channel: Channel) -> None:
        with self._lock:
            self._to_watch.append(channel)
        self._waker.wake()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Under the lock, and not shut down during the ``with`` block."""
        with self._lock:
            if self._closed is not None:
                raise RepriseError(self._closed)
            yield

    # ---- the thread that reads -------------------------------------------------------------

    def _loop(self) -> None:
        try:
            lost = self._serve()
        except Exception as error:
            logger.critical("the thread that reads from replicas ended", exc_info=True)
            lost = f"the thread that reads from replicas ended ({describe(error)})"
        if lost is not None:
            logger.critical("%s", lost)
            lost = f"{lost}. All requests have ended, and the other replicas with them"
        self._close(lost or self._closed or "")
        self._fleet.end()
        if lost is None:
            self._fleet.remove()
        self._selector.close()

    def _serve(self) -> str | None:
        """Until :meth:`shutdown`, or until a replica is lost; then how it went."""
        left = {each.index for each in self._replicas}
        while left:
            given: list[Reader] = []
            for key, events in self._selector.select(POLL_SECONDS):
                if key.data is None:
                    self._woken()
                    continue
                replica, channel = key.data
                if channel is not None and events & selectors.EVENT_WRITE:
                    channel.send_rest()
                    if not channel.blocked:
                        self._selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                if not events & selectors.EVENT_READ:
                    continue
                if channel is None:
                    over = replica.hear() is Heard.GONE
                else:
                    over = self._read(channel, given)
                if over:
                    self._selector.unregister(key.fileobj)
                    if not self._stopping:
                        self._say(given)
                        return self._fleet.ended(replica)
                    if channel is not None:
                        left.discard(replica.index)
            self._say(given)
            for replica in self._replicas:
                stands_still = None if self._stopping else replica.lost()
                if stands_still is not None:
                    return stands_still
            if self._stopping and time.monotonic() > self._deadline:
                logger.warning("replicas do not end within %.0f s: they are killed", STOP_SECONDS)
                return None
        for replica in self._replicas:
            replica.end(STOP_SECONDS)
        return None

    def _say(self, given: list[Reader]) -> None:
        if given:
            self._delivered(given)

    def _woken(self) -> None:
        self._waker.clear()
        with self._lock:
            blocked, self._to_watch = self._to_watch, []
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[1] in blocked:
                self._selector.modify(key.fileobj, both, key.data)

    def _read(self, channel: Channel, given: list[Reader]) -> bool:
        """Whether nothing more comes."""
        try:
            received = channel.connection.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            return True
        for message in channel.frames.feed(received):
            if isinstance(message, wire.Deltas):
                for number, *packed in message.items:
                    self._take(number, tuple(packed), given)
            elif isinstance(message, wire.Refused):
                self._refused(message)
            elif isinstance(message, wire.Reply):
                self._answered(message)
        return not received

    def _take(self, number: int, packed: tuple[Any, ...], given: list[Reader]) -> None:
        """An item of :class:`wire.Deltas`."""
        with self._lock:
            request = self._requests.get(number)
            if request is None:
                return  # its reader has left
            if packed:
                delta = self._unpacked(request, packed)
                if request.waits and delta.outputs:
                    request.waits = False
                    assert request.route is not None
                    self.router.began(request.route)
                if delta.finished:
                    self._forget(request)
        if not packed:
            request.reader.accepted(request)
            settle(request.future, lambda: request)
            return
        if request.held is not None:
            request.held.extend(delta)
            delta = request.held
            request.held = None
        if delta.finished or request.reader.wants_more:
            request.reader.put(delta)
            given.append(request.reader)
        else:
            request.held = delta

    def _unpacked(self, request: Request, packed: tuple[Any, ...]) -> RequestOutput:
        delta = unpack(
            packed, request.request_id, request.prompt, request.prompt_token_ids,
            request.metrics, self._text_of,
        )  # fmt: skip
        request.metrics = delta.metrics
        if request.params.n == 1 and delta.outputs:
            request.output += delta.outputs[0].token_ids
        return delta

    def _refused(self, message: wire.Refused) -> None:
        error = named(message.kind, message.message)
        if self._in_step and isinstance(error, RanksError):
            return  # its process ends, and why is told to all at once
        with self._lock:
            asked = self._asked.pop(message.number, None)
            request = self._requests.get(message.number)
            if request is not None:
                route = self._forget(request)
        if asked is not None:
            refuse(asked[1], error)
        elif request is not None:
            if isinstance(error, StepError):
                where = self._replicas[route.replica]
                error = StepError(f"{where.name} ({where.device}): {error}; its log: {where.log}")
            if isinstance(error, FailedRequestError) and message.output is not None:
                error.outputs = [self._unpacked(request, message.output)]
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if request.future.done():
            request.reader.fail(error)
        else:
            refuse(request.future, error)

    def _answered(self, message: wire.Reply) -> None:
        with self._lock:
            asked = self._asked.pop(message.number, None)
        if asked is not None:
            settle(asked[1], lambda: message.result)

    def _forget(self, request: Request) -> Route:
        """It has ended; under the lock."""
        del self._requests[request.number]
        if self._names.get(request.request_id) == request.number:
            del self._names[request.request_id]
        assert request.route is not None
        tokens: Sequence[int] = ()
        if request.params.n == 1:
            tokens = [*request.prompt_token_ids, *request.output]
        self.router.ended(request.route, tokens, request.prepared[0].cache_salt)
        return request.route

    def _close(self, reason: str) -> None:
        """There are no replicas, here or, after a fork, in this process: let nobody wait."""
        with self._lock:
            self._closed = reason
            requests, self._requests = list(self._requests.values()), {}
            asked, self._asked = list(self._asked.values()), {}
            self._names.clear()
        for request in requests:
            self._fail(request, RepriseError(reason))
        for _, future in asked:
            refuse(future, RepriseError(reason))


_living: weakref.WeakSet[Replicas] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_living):
        each._lock = threading.RLock()  # a thread of the parent may have held it
        for replica in each._replicas:
            replica.forget()
        for channel in each._channels:
            channel.connection.close()
        each._close(
            "this process was forked and the replicas belong to its parent; create the LLM in the "
            "process that uses it"
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""An engine in a thread of its own, which readers in other threads or processes ask."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from reprise.config import EngineConfig
from reprise.engine import left_behind
from reprise.engine.command import Command
from reprise.engine.completion import CompletionGroup
from reprise.engine.driver import Admit, Reader
from reprise.engine.engine import Engine
from reprise.engine.frontend import Frontend
from reprise.engine.prompt import PreparedPrompt
from reprise.engine.questions import QUESTIONS
from reprise.engine.submission import PreparedParams
from reprise.engine.tokenizing import Tokenizing
from reprise.errors import RanksError, RepriseError, describe, ordinary
from reprise.parallel import Elsewhere, Seat
from reprise.sampling_params import SamplingParams

T = TypeVar("T")

logger = logging.getLogger(__name__)

IDLE_AFTER_SECONDS = 0.05
"""Without a request, until graphs are proven further: those of a conversation come in turns."""
MOST_BETWEEN_SECONDS = 0.01
"""That what others want may keep a step waiting: requests may come faster than they are taken."""
MOST_GATHERING_SECONDS = 0.04
"""The same where nothing runs, and requests come that are said to be some of many."""
NEXT_SECONDS = 0.003
"""How long the next of these requests is waited for."""


class Submission(NamedTuple):
    """A request that was prepared elsewhere."""

    request_id: str
    prompt: PreparedPrompt
    params: PreparedParams
    priority: int
    ordinal: int | None
    """As of :meth:`reprise.engine.Engine.add`."""
    reader: Reader


class EngineLost(BaseException):
    """The engine is of no use any more. Not an Exception: nobody goes on behind it."""


PREPARING_GRAMMARS = 4
"""Requests with a grammar that are prepared at once: each waits while its grammar is compiled."""


class EngineThread:
    """Drives one engine. Other threads tokenize, so that no text however long delays a step or
    another text, and prepare requests with a grammar, which may take long to compile.

    Args:
        config: Of the engine.
        delivered: Called behind the deliveries of a step with the readers that got something.
        elsewhere: As of :class:`reprise.engine.Engine`.
        seat: As of :class:`Engine`.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(
        self,
        config: EngineConfig,
        delivered: Callable[[Sequence[Any]], None],
        elsewhere: Elsewhere | None = None,
        seat: Seat | None = None,
    ) -> None:
        self.engine = Engine(config, elsewhere, seat)
        self._delivered = delivered
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._readers: dict[str, Reader] = {}
        """Of requests that the engine has; for its thread alone."""
        self._preparing: dict[Reader, tuple[str, bool]] = {}
        """Request ids of those whose prompts are being tokenized, and whether they were aborted;
        under the lock."""
        self._accepted: list[Reader] = []
        """Threads that are to be woken for that; for the engine's thread alone."""
        self._step_at: float | None = None
        """When the next step goes first, whatever else is wanted; None: nothing was done since the
        last one. For the engine's thread alone."""
        self._gather_until: float | None = None
        """When the next step goes first, if it is the first one of requests that come together;
        None: something runs. For the engine's thread alone."""
        self._next_by: float | None = None
        """Until then such a step waits for another request; None: a single one has come. For the
        engine's thread alone."""
        self._may_prove = True
        """There may be graphs to be proven further; for the engine's thread alone."""
        self._closed: str | None = None
        """Why nothing more is accepted."""
        self._lock = threading.Lock()
        self._tokenizing = Tokenizing()
        self._structuring = ThreadPoolExecutor(PREPARING_GRAMMARS, "reprise-structured")
        self._thread = threading.Thread(target=self._loop, name="reprise-engine", daemon=True)
        if self.engine.lockstep is not None:  # before it rests for the first time
            self.engine.lockstep.on_wake(lambda: self._commands.put(Command(lambda: None)))
        self.engine.runner.when_lost(lambda: self._commands.put(Command(self._check)))
        left_behind.add(self)
        self._thread.start()

    # ---- any thread ------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt: Callable[[], Any] | PreparedPrompt,
        params: SamplingParams | PreparedParams | None,
        priority: int,
        reader: Reader,
        admit: Admit | None = None,
        ordinal: int | None = None,
        *,
        long: bool = False,
    ) -> Future[CompletionGroup]:
        """As of :class:`reprise.engine.driver.Driver`.

        Args:
            ordinal: As of :meth:`reprise.engine.Engine.add`.
        """
        accepted: Future[CompletionGroup] = Future()

        def prepare() -> None:
            if reader not in self._preparing:
                return  # it has left
            command = Command(
                lambda: self._add(request_id, prepared, priority, reader, admit, ordinal), accepted
            )
            try:
                engine = self.engine
                given = prompt if isinstance(prompt, PreparedPrompt) else prompt()
                prepared = (engine.prepare(given), engine.prepare_params(params))
                if threading.current_thread() is self._thread:
                    command.run()  # before what was said of it later, such as that it is left
                    return
                with self._open():
                    self._commands.put(command)
            except BaseException as error:  # libraries in Rust raise one where they panic
                with self._lock:
                    self._preparing.pop(reader, None)
                if not accepted.done():
                    command.refuse(ordinary(error))
                if not isinstance(error, Exception):
                    raise

        with self._open():
            self._preparing[reader] = (request_id, False)
            ready = isinstance(prompt, PreparedPrompt) and isinstance(params, PreparedParams)
            if not ready:
                # Neither the engine nor other callers wait for the tokenizer or a grammar.
                if getattr(params, "structured_outputs", None) is None:
                    self._tokenizing.submit(prepare, long)
                else:
                    self._structuring.submit(prepare)
        if ready:
            prepare()
        return accepted

    def submit_all(self, requests: Sequence[Submission]) -> None:
        """Have requests computed that were prepared elsewhere; no step comes in between. Of each
        that is refused the reader learns why.

        Raises:
            RepriseError: The thread has ended.
        """

        def add() -> None:
            for each in requests:
                try:
                    group = self.engine.add(
                        each.request_id, each.prompt, each.params, each.priority, each.ordinal
                    )
                except Exception as error:
                    each.reader.fail(error)
                else:
                    self._readers[each.request_id] = each.reader
                    each.reader.accepted(group)
            self._delivered([each.reader for each in requests])

        self.call(add)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run in the engine's thread, between two steps.

        Raises:
            RepriseError: The thread has ended.
        """
        future: Future[T] = Future()
        with self._open():  # a command behind the end would never be answered
            self._commands.put(Command(function, future))
        return future

    def between_steps(self, function: Callable[[], None], *, more: bool = False) -> None:
        """As of :class:`reprise.engine.driver.Driver`."""

        def run() -> None:
            function()
            self._gather(more)

        with self._open():
            self._commands.put(Command(run))

    @property
    def frontend(self) -> Frontend:
        """What requests are checked against."""
        return self.engine

    def ask(self, name: str, *arguments: Any) -> Future[list[Any]]:
        """As of :class:`reprise.engine.driver.Driver`."""
        return self.call(lambda: [QUESTIONS[name].answer(self.engine, *arguments)])

    def tokenize(self, function: Callable[[], T], *, long: bool = False) -> Future[T]:
        """As of :class:`reprise.engine.driver.Driver`."""
        with self._open():
            return self._tokenizing.submit(function, long)

    def abort(self, request_id: str) -> Future[None]:
        """As of :class:`reprise.engine.driver.Driver`."""

        def abort() -> None:
            with self._lock:
                for reader, (name, _) in self._preparing.items():
                    if name == request_id:
                        self._preparing[reader] = (name, True)  # ends when the engine has it
            self._end([request_id])

        return self.call(abort)

    def leave(self, request_id: str, reader: Reader) -> None:
        """As of :class:`reprise.engine.driver.Driver`."""
        with self._lock:
            self._preparing.pop(reader, None)
        self._commands.put(Command(lambda: self._leave(request_id, reader)))

    @property
    def num_waiting(self) -> int:
        """Requests that compute nothing yet; completions of one count one by one."""
        return len(self._preparing) + self.engine.scheduler.stats().num_waiting

    @property
    def closed(self) -> str | None:
        """Why nothing more is accepted; None: all is well."""
        return self._closed

    def shutdown(self) -> None:
        """Abort all requests, stop the thread and free the device's memory."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Have all that :meth:`shutdown` does done, without waiting for it."""
        with self._lock:
            if self._closed is None:
                self._closed = "the engine was shut down; create a new AsyncLLM"
                self._commands.put(None)
        self._tokenizing.shutdown()
        self._structuring.shutdown(wait=False)

    def drop(self) -> None:
        """As of :class:`reprise.engine.driver.Driver`."""
        self._commands.put(None)  # it takes no lock that this thread may hold

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most so many seconds."""
        self._thread.join(timeout)

    def forked(self) -> None:
        """Refuse everything in a process that was forked off: the thread is its parent's."""
        self._lock = threading.Lock()  # a thread of the parent may have held it
        self._commands = queue.SimpleQueue()
        self._close(
            "this process was forked and the engine's thread runs in its parent; create the "
            "AsyncLLM in the process that uses it"
        )

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """The engine is not shut down during the ``with`` block."""
        with self._lock:
            if self._closed is not None:
                raise RepriseError(self._closed)
            yield

    # ---- the engine's thread ---------------------------------------------------------------

    def _loop(self) -> None:
        try:
            self.engine.platform.activate()
            self._serve()
        except BaseException as error:
            # No other thread would tell those that wait.
            logger.critical("the engine's thread ended", exc_info=True)
            self._close(f"the engine's thread ended ({describe(error)}); create a new AsyncLLM")

    def _serve(self) -> None:
        while True:
            try:
                command = self._next_command()
            except queue.Empty:
                self._tell_accepted()
                work = self._step if self.engine.must_step else self._prove
                command = Command(partial(self._attempt, work))
            if command is None:
                break
            command.run()
        try:
            self._attempt(lambda: self._deliver(self.engine.abort(list(self._readers))))
        finally:
            self.engine.close()

    def _next_command(self) -> Command | None:
        """What others want done. Raises queue.Empty when there is time for something else."""
        engine = self.engine
        if not engine.must_step:
            self._tell_accepted()
            with engine.resting():
                if not engine.must_step:  # nor has anybody come to want it meanwhile
                    seconds = IDLE_AFTER_SECONDS if self._may_prove else None
                    self._step_at = self._gather_until = self._next_by = None
                    command = self._begun(self._commands.get(timeout=seconds))
                    if engine.lockstep is None:  # others may have steps to do
                        self._gather_until = time.perf_counter() + MOST_GATHERING_SECONDS
                    return command
        self._may_prove |= engine.has_work
        wait = self._gathering_seconds()
        if not wait and self._step_at is not None and time.perf_counter() > self._step_at:
            raise queue.Empty
        return self._begun(self._commands.get(timeout=wait))

    def _begun(self, command: Command | None) -> Command | None:
        if self._step_at is None:
            self._step_at = time.perf_counter() + MOST_BETWEEN_SECONDS
        return command

    def _gather(self, more: bool) -> None:
        """A request has come; ``more``: it is said to be one of several. Of these none is known to
        be the last one: clients that an HTTP process has not seen yet are not told of."""
        if self._gather_until is not None and (more or self._next_by is not None):
            self._next_by = time.perf_counter() + NEXT_SECONDS

    def _gathering_seconds(self) -> float:
        """How long to wait for another request."""
        if self._gather_until is None or self._next_by is None:
            return 0.0
        engine = self.engine
        if engine.scheduler.num_waiting_tokens >= engine.runner.max_tokens:
            return 0.0  # the step would not have it
        return max(0.0, min(self._next_by, self._gather_until) - time.perf_counter())

    def _tell_accepted(self) -> None:
        """Tell the readers of a burst at once that their requests were accepted."""
        if self._accepted:
            readers, self._accepted = self._accepted, []
            self._delivered(readers)

    def _prove(self) -> None:
        self._may_prove = False  # if it fails, it does so once
        self._may_prove = self.engine.prove_idle(lambda: not self._commands.empty())

    def _add(
        self,
        request_id: str,
        prepared: tuple[PreparedPrompt, PreparedParams],
        priority: int,
        reader: Reader,
        admit: Admit | None,
        ordinal: int | None,
    ) -> CompletionGroup:
        if reader not in self._preparing:
            raise RepriseError("its reader has left")
        try:
            if admit is not None:
                admit(*prepared, self.engine.scheduler.num_waiting_tokens)
            group = self.engine.add(request_id, *prepared, priority, ordinal)
            reader.accepted(group)
            self._accepted.append(reader)
            self._readers[request_id] = reader
        finally:
            with self._lock:
                _, aborted = self._preparing.pop(reader, (request_id, False))
        if aborted:
            self._end([request_id])
        self._gather(bool(self._preparing))  # those that are being tokenized come, too
        return group

    def _check(self) -> None:
        """Others that compute with this engine may be lost, even if none of them was asked for
        anything."""
        try:
            self.engine.runner.check()
        except RanksError as error:
            self._fail_readers(error)
            raise EngineLost(describe(error)) from error

    def _step(self) -> None:
        self._step_at = self._gather_until = None
        self._deliver(self.engine.step())

    def _end(self, request_ids: Sequence[str]) -> None:
        self._attempt(lambda: self._deliver(self.engine.abort(request_ids)))

    def _leave(self, request_id: str, reader: Reader) -> None:
        # A later request may have the same id.
        if self._readers.get(request_id) is reader:
            del self._readers[request_id]
            self._end([request_id])

    def _attempt(self, change: Callable[[], None]) -> None:
        """Do what changes requests. If it fails half-way every request ends, and its caller learns
        why; the engine serves on.

        Raises:
            EngineLost: It cannot.
        """
        try:
            change()
        except Exception as error:
            logger.exception("the engine failed; all running requests are aborted")
            self._fail_readers(error)
            try:
                self.engine.start_over()
            except Exception as again:
                # Such as a device that answers nothing any more: all later requests would fail.
                raise EngineLost(f"it cannot start over: {describe(again)}") from again
            raise

    def _fail_readers(self, error: Exception) -> None:
        for each in self._readers.values():
            each.fail(error)
        self._readers.clear()

    def _close(self, reason: str) -> None:
        """The thread is over, here or, after a fork, in this process: let no caller wait for it."""
        error = RepriseError(reason)
        with self._lock:
            self._closed = reason
        self._fail_readers(error)
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    command.refuse(error)

    def _deliver(self, groups: Sequence[CompletionGroup]) -> None:
        # Waking a reader's thread or process takes a system call, so they are woken together.
        given: list[Reader] = []
        readers = self._readers
        for group in groups:
            reader = readers.get(group.request_id)
            if reader is not None and group.error is None and reader.wants_more:
                texts = reader.texts
                alone = None if texts is None else group.text_alone()
                if texts is not None and alone is not None:  # so it has not finished
                    texts.put_text(*alone)
                    given.append(reader)
                    continue
            finished = group.finished
            if reader is not None and group.error is not None:
                reader.fail(group.error)
            elif reader is not None and (finished or reader.wants_more):
                reader.put(group.delta())
                given.append(reader)
            if finished:
                readers.pop(group.request_id, None)
        if given:
            self._delivered(given)

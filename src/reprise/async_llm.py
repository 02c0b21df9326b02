"""The streaming interface: requests come and go while the engine runs in its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from reprise.config import EngineConfig
from reprise.engine import CompletionGroup, ContentFormat, Engine, EngineStats, chat_prompt
from reprise.errors import RepriseError, describe
from reprise.outputs import RequestOutput
from reprise.sampling_params import SamplingParams

T = TypeVar("T")

logger = logging.getLogger(__name__)


class AsyncLLM:
    """A model that serves many callers of one asyncio program.

    Args:
        model: As of :class:`reprise.LLM`.
        **options: The fields of :class:`reprise.config.EngineConfig`.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.engine = Engine(EngineConfig.from_arguments(model=model, **options))
        self._ids = itertools.count()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        """Of requests that the engine has; for its thread alone."""
        self._preparing: dict[_Stream, str] = {}
        """Request ids of those whose prompts are being tokenized; under the lock."""
        self._closed: str | None = None
        """Why nothing more is accepted."""
        self._lock = threading.Lock()
        _living.add(self)
        self._tokenizing = ThreadPoolExecutor(1, "reprise-tokenizer")
        self._thread = threading.Thread(target=self._loop, name="reprise-engine", daemon=True)
        self._thread.start()

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Stream a request's output: each item holds everything generated so far.

        Leaving the loop early, or cancelling the task, aborts the request. A consumer slower than
        the engine skips intermediate states, never tokens.

        Args:
            prompt: As one of :meth:`reprise.LLM.generate`.
            sampling_params: None: as the checkpoint recommends.
            request_id: None: a new one.
            priority: Lower is more urgent.

        Raises:
            RequestError: The prompt or a parameter is invalid.
            CapacityError: The prompt does not fit the context or the cache.
        """
        return self._outputs(lambda: prompt, sampling_params, request_id, priority)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Stream the answer to a conversation; arguments as of :meth:`reprise.LLM.chat` and
        :meth:`generate`."""

        def prompt() -> Any:
            return chat_prompt(
                self.engine.tokenizer,
                messages,
                chat_template=chat_template,
                chat_template_content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            )

        return self._outputs(prompt, sampling_params, request_id, priority)

    async def _outputs(
        self,
        prompt: Callable[[], Any],
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> AsyncIterator[RequestOutput]:
        name = f"async-{next(self._ids)}" if request_id is None else request_id
        stream = _Stream(asyncio.get_running_loop())
        with self._open():
            self._preparing[stream] = name
            # Neither the engine nor other callers wait for the tokenizer.
            preparing = self._tokenizing.submit(lambda: self.engine.prepare(prompt()))

        def add() -> None:
            self.engine.add(name, prepared, sampling_params, priority)
            self._streams[name] = stream
            with self._lock:
                del self._preparing[stream]
            if stream.aborted:
                self._end([name])

        try:
            prepared = await asyncio.wrap_future(preparing)
            await self._call(add)
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            with self._lock:
                self._preparing.pop(stream, None)
            self._commands.put(_Command(lambda: self._leave(name, stream)))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream delivers a last output with finish reason ``abort``."""

        def abort() -> None:
            with self._lock:
                preparing = [each for each, name in self._preparing.items() if name == request_id]
            for stream in preparing:
                stream.aborted = True  # it ends as soon as the engine has it
            self._end([request_id])

        await self._call(abort)

    async def stats(self) -> EngineStats:
        """The engine's metrics at this moment."""
        return await self._call(self.engine.stats)

    def shutdown(self) -> None:
        """Abort all requests and stop the engine's thread."""
        with self._lock:
            if self._closed is None:
                self._closed = "the engine was shut down; create a new AsyncLLM"
                self._commands.put(None)
        self._tokenizing.shutdown(wait=False)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)

    async def _call(self, function: Callable[[], T]) -> T:
        """Run in the engine's thread, between two steps."""
        future: Future[T] = Future()
        with self._open():  # a command behind the end would never be answered
            self._commands.put(_Command(function, future))
        return await asyncio.wrap_future(future)

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
            # Nobody else would tell those who wait.
            logger.critical("the engine's thread ended", exc_info=True)
            self._close(f"the engine's thread ended ({describe(error)}); create a new AsyncLLM")

    def _serve(self) -> None:
        while True:
            block = not self.engine.has_work
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                command = _Command(lambda: self._attempt(self._step))
            if command is None:
                break
            command.run()
        self._attempt(lambda: self._deliver(self.engine.abort(list(self._streams))))

    def _step(self) -> None:
        self._deliver(self.engine.step())

    def _end(self, request_ids: Sequence[str]) -> None:
        self._attempt(lambda: self._deliver(self.engine.abort(request_ids)))

    def _leave(self, request_id: str, stream: _Stream) -> None:
        """A stream's reader is gone."""
        # A later request may have the same id.
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._end([request_id])

    def _attempt(self, change: Callable[[], None]) -> None:
        """Do what changes requests. If it fails half-way every request ends, and its caller learns
        why; the engine serves on."""
        try:
            change()
        except Exception as error:
            logger.exception("the engine failed; all running requests are aborted")
            self._fail_streams(error)
            self.engine.start_over()
            raise

    def _fail_streams(self, error: Exception) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()

    def _close(self, reason: str) -> None:
        """The thread is over, here or, after a fork, in this process: let nobody wait for it."""
        error = RepriseError(reason)
        with self._lock:
            self._closed = reason
        self._fail_streams(error)
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    command.refuse(error)

    def _deliver(self, groups: Sequence[CompletionGroup]) -> None:
        for group in groups:
            stream = self._streams.get(group.request_id)
            if stream is not None and (group.finished or stream.taken):
                stream.put(group.output())
            if group.finished:
                self._streams.pop(group.request_id, None)


_living: weakref.WeakSet[AsyncLLM] = weakref.WeakSet()


def _after_fork() -> None:
    for each in _living:
        each._lock = threading.Lock()  # a thread of the parent may have held it
        each._commands = queue.SimpleQueue()
        each._close(
            "this process was forked and the engine's thread runs in its parent; create the "
            "AsyncLLM in the process that uses it"
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Command:
    """What the engine's thread is to do between two steps.

    Args:
        function: Does it.
        future: Gets the result or the exception, which then concerns its owner alone; None: nobody
            waits, and exceptions were dealt with.
    """

    def __init__(self, function: Callable[[], Any], future: Future[Any] | None = None) -> None:
        self._function = function
        self._future = future

    def run(self) -> None:
        if self._future is not None and not self._future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except Exception as error:
            self._refuse(error)
        except BaseException as error:
            self._refuse(RepriseError(f"the engine's thread ended ({describe(error)})"))
            raise
        else:
            if self._future is not None:
                self._future.set_result(result)

    def refuse(self, error: Exception) -> None:
        """It is not going to be done."""
        if self._future is None or self._future.set_running_or_notify_cancel():
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if self._future is not None:
            self._future.set_exception(error)


class _Stream:
    """Hands the latest output from the engine's thread to one coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._error: Exception | None = None
        self.aborted = False
        """Before the engine had its request."""

    @property
    def taken(self) -> bool:
        """The coroutine has what was put last, so it is worth while to put more."""
        return not self._ready.is_set()

    def put(self, output: RequestOutput) -> None:
        self._latest = output
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def next(self) -> RequestOutput:
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            raise self._error
        assert self._latest is not None
        return self._latest

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            logger.debug("the event loop of a stream was closed; its output is dropped")

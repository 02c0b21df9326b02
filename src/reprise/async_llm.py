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
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from reprise.config import EngineConfig
from reprise.engine import CompletionGroup, ContentFormat, Engine, EngineStats, chat_prompt
from reprise.errors import RepriseError, RequestError, describe
from reprise.metrics import Metric
from reprise.outputs import RequestOutput
from reprise.sampling_params import RequestOutputKind, SamplingParams
from reprise.vllm_names import refuse_others

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
        self.engine = Engine(EngineConfig(model=model, **options))
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

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> Self:
        """From options that were put together before."""
        return cls(**engine_args.arguments())

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **others: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Stream a request's output.

        Each item holds what ``sampling_params.output_kind`` says: everything generated so far, what
        is new, or, once, everything. Leaving the loop early, or cancelling the task, aborts the
        request. A consumer slower than the engine gets the tokens of several steps at once.

        Args:
            prompt: As one of :meth:`reprise.LLM.generate`.
            sampling_params: None: as the checkpoint recommends.
            request_id: None: a new one.
            priority: Lower is more urgent.
            **others: vLLM's other arguments, which must ask for nothing.

        Raises:
            RequestError: The prompt or a parameter is invalid.
            CapacityError: The prompt does not fit the context or the cache.
        """
        refuse_others(self.generate, others)
        return self._outputs(lambda: prompt, _own(sampling_params), request_id, priority)

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
        **others: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Stream the answer to a conversation; arguments as of :meth:`reprise.LLM.chat` and
        :meth:`generate`."""
        refuse_others(self.chat, others)

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

        return self._outputs(prompt, _own(sampling_params), request_id, priority)

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
            preparing = self._tokenizing.submit(
                lambda: (self.engine.prepare(prompt()), self.engine.prepare_params(sampling_params))
            )

        def add() -> RequestOutputKind:
            kind = self.engine.add(name, prepared, params, priority).params.output_kind
            stream.final_only = kind is RequestOutputKind.FINAL_ONLY
            self._streams[name] = stream
            with self._lock:
                del self._preparing[stream]
            if stream.aborted:
                self._end([name])
            return kind

        try:
            prepared, params = await asyncio.wrap_future(preparing)
            kind = await self._call(add)
            whole: RequestOutput | None = None
            while whole is None or not whole.finished:
                delta = await stream.next()
                if whole is None or kind is RequestOutputKind.DELTA:
                    whole = delta
                else:
                    whole.extend(delta)
                # Here and not in the engine's thread, whose steps all streams wait for.
                yield whole.copy() if kind is RequestOutputKind.CUMULATIVE else whole
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

    async def get_metrics(self) -> list[Metric]:
        """As of :meth:`reprise.LLM.get_metrics`."""
        return await self._call(self.engine.metrics)

    async def get_tokenizer(self) -> Any:
        """transformers' tokenizer."""
        if self.engine.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        return self.engine.tokenizer

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns True, for vLLM's may fail."""
        await self._call(lambda: self.engine.scheduler.reset_prefix_cache())
        return True

    async def start_profile(self, directory: str | os.PathLike[str] | None = None) -> None:
        """As of :meth:`reprise.LLM.start_profile`."""
        await self._call(lambda: self.engine.profiler.start(directory))

    async def stop_profile(self) -> Path:
        """As of :meth:`reprise.LLM.stop_profile`."""
        return await self._call(self.engine.profiler.stop)

    def shutdown(self) -> None:
        """Abort all requests, stop the engine's thread and free the device's memory."""
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
        try:
            self._attempt(lambda: self._deliver(self.engine.abort(list(self._streams))))
        finally:
            self.engine.close()

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
        # Waking a loop takes a system call, so its streams are woken together.
        woken: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for group in groups:
            stream = self._streams.get(group.request_id)
            if stream is not None and (group.finished or stream.wants_more):
                stream.put(group.delta())
                woken.setdefault(stream.loop, []).append(stream)
            if group.finished:
                self._streams.pop(group.request_id, None)
        for loop, streams in woken.items():
            _wake(loop, streams)


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


def _own(params: Any) -> Any:
    """A copy: the caller may change his before the engine's thread takes them."""
    return params.clone() if isinstance(params, SamplingParams) else params


class _Stream:
    """Hands what is new from the engine's thread to one coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.final_only = False
        self.loop = loop
        self.ready = asyncio.Event()
        self._deltas: deque[RequestOutput] = deque()
        self._error: Exception | None = None
        self.aborted = False
        """Before the engine had its request."""

    @property
    def wants_more(self) -> bool:
        """The coroutine has what was put last, so it is worth while to put more."""
        return not self.final_only and not self._deltas

    def put(self, delta: RequestOutput) -> None:
        """Whoever puts wakes the coroutine too."""
        self._deltas.append(delta)

    def fail(self, error: Exception) -> None:
        self._error = error
        _wake(self.loop, [self])

    async def next(self) -> RequestOutput:
        while not self._deltas and self._error is None:
            await self.ready.wait()
            self.ready.clear()
        if self._error is not None:
            raise self._error
        found = self._deltas.popleft()
        while self._deltas:  # the last one may be put before this one was taken
            found.extend(self._deltas.popleft())
        return found


def _wake(loop: asyncio.AbstractEventLoop, streams: Sequence[_Stream]) -> None:
    """Have the coroutines look at what was put for them."""

    def wake() -> None:
        for each in streams:
            each.ready.set()

    try:
        loop.call_soon_threadsafe(wake)
    except RuntimeError:
        logger.debug("the event loop of a stream was closed; its output is dropped")

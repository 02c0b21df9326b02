"""The streaming interface: requests come and go while the engine runs in its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from reprise.config import EngineConfig
from reprise.engine import CompletionGroup, ContentFormat, Engine, EngineStats, chat_prompt
from reprise.errors import RepriseError
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
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._closed = False
        self._lock = threading.Lock()
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
        # Neither the engine nor other callers wait for the tokenizer.
        with self._open():
            preparing = self._tokenizing.submit(lambda: self.engine.prepare(prompt()))
        prepared = await asyncio.wrap_future(preparing)

        def add() -> None:
            self.engine.add(name, prepared, sampling_params, priority)
            self._streams[name] = stream

        try:
            await self._call(add)
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            self._submit(lambda: self._abort(name, stream))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream delivers a last output with finish reason ``abort``."""
        await self._call(lambda: self._deliver(self.engine.abort([request_id])))

    async def stats(self) -> EngineStats:
        """The engine's metrics at this moment."""
        return await self._call(self.engine.stats)

    def shutdown(self) -> None:
        """Abort all requests and stop the engine's thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
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

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._open():  # a command behind the end would never be answered
            self._submit(run)
        return await asyncio.wrap_future(future)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """The engine is not shut down during the ``with`` block."""
        with self._lock:
            if self._closed:
                raise RepriseError("the engine was shut down; create a new AsyncLLM")
            yield

    def _submit(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def _loop(self) -> None:
        self.engine.platform.activate()
        while True:
            block = not self.engine.has_work
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                self._advance()
                continue
            if command is None:
                break
            command()
        self._deliver(self.engine.abort(list(self._streams)))

    def _advance(self) -> None:
        try:
            self._deliver(self.engine.step())
        except Exception as error:
            # The engine aborted every request and serves on; their callers learn why.
            logger.exception("a step failed; all running requests are aborted")
            for stream in self._streams.values():
                stream.fail(error)
            self._streams.clear()

    def _deliver(self, groups: Sequence[CompletionGroup]) -> None:
        for group in groups:
            stream = self._streams.get(group.request_id)
            if stream is not None and (group.finished or stream.taken):
                stream.put(group.output())
            if group.finished:
                self._streams.pop(group.request_id, None)

    def _abort(self, request_id: str, stream: _Stream) -> None:
        # A later request may have the same id.
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.engine.abort([request_id])


class _Stream:
    """Hands the latest output from the engine's thread to one coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._error: Exception | None = None

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

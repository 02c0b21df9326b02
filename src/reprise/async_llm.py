"""The streaming interface: requests come and go while the engine runs in its own thread."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from reprise.arguments import plain, plain_path, shown
from reprise.config import EngineConfig
from reprise.engine import (
    Acceptance,
    ContentFormat,
    Engine,
    EngineStats,
    Frontend,
    chat_prompt,
    together,
)
from reprise.engine.tokenizing import is_long
from reprise.errors import RequestError, UnsupportedError
from reprise.loading import as_transformers
from reprise.metrics import Metric
from reprise.outputs import RequestOutput
from reprise.replicas import drive
from reprise.sampling_params import RequestOutputKind, SamplingParams
from reprise.vllm_names import ASYNC_METHODS, refuse_others

logger = logging.getLogger(__name__)


class AsyncLLM:
    """A model that serves many callers of one asyncio program.

    It shuts itself down once it is garbage and none of its streams is left.

    Args:
        model: As of :class:`reprise.LLM`.
        **options: The fields of :class:`reprise.config.EngineConfig`.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._driver = drive(EngineConfig(model=model, **options), _wake_all)
        # Its threads and processes would not notice that it was dropped, and keep all memory.
        weakref.finalize(self, self._driver.drop).atexit = False
        self._ids = itertools.count()

    @property
    def engine(self) -> Engine:
        """What computes, in a thread of its own.

        Raises:
            ConfigError: With ``data_parallel_size`` there are several, in other processes.
        """
        return self._driver.engine

    @property
    def frontend(self) -> Frontend:
        """What is known of the model, wherever it is: its tokenizer, its limits."""
        return self._driver.frontend

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> Self:
        """Make one from options that were put together before."""
        return cls(**engine_args.arguments())

    def generate(
        self,
        prompt: Any = None,
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
            request_id: Of no other that runs; None: a new one.
            priority: Lower is more urgent.
            **others: vLLM's other arguments, which must ask for nothing.

        Raises:
            RequestError: The prompt or a parameter is invalid.
            CapacityError: The prompt does not fit the context or the cache.
            FailedRequestError: The request's logits were NaN or infinite (NonFiniteError), or its
                grammar was left (GrammarError).
        """
        refuse_others(self.generate, others)
        params = _own(sampling_params)
        # Token ids alone are looked through, however many, in no time.
        texts = prompt if isinstance(prompt, str | Mapping) else ()
        long = is_long(texts, getattr(params, "bad_words", None))
        return self._outputs(lambda: prompt, params, request_id, priority, long)

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
                self.frontend.tokenizer,
                messages,
                chat_template=chat_template,
                chat_template_content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            )

        params = _own(sampling_params)
        long = is_long(messages, tools, documents, getattr(params, "bad_words", None))
        return self._outputs(prompt, params, request_id, priority, long)

    async def _outputs(
        self,
        prompt: Callable[[], Any],
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        long: bool,
    ) -> AsyncIterator[RequestOutput]:
        name = f"async-{next(self._ids)}" if request_id is None else _name(request_id)
        stream = _Stream(asyncio.get_running_loop())
        accepted = self._driver.submit(name, prompt, sampling_params, priority, stream, long=long)
        try:
            kind = (await asyncio.wrap_future(accepted)).params.output_kind
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
            self._driver.leave(name, stream)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End a request, or several; their streams deliver a last output with finish reason
        ``abort``. One that does not run is no error.

        Raises:
            RequestError: It is no id and no list of them.
        """
        found = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(found, Iterable):
            raise RequestError(f"request_id={shown(request_id)}: give a string, or a list of them")
        names = [_name(each) for each in found]
        await asyncio.gather(*(asyncio.wrap_future(self._driver.abort(each)) for each in names))

    async def stats(self) -> EngineStats:
        """The engine's metrics at this moment."""
        return await self._ask("stats")

    async def get_metrics(self) -> list[Metric]:
        """As of :meth:`reprise.LLM.get_metrics`."""
        return await self._ask("metrics")

    async def get_tokenizer(self) -> Any:
        """transformers' tokenizer."""
        if self.frontend.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        return as_transformers(self.frontend.tokenizer)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns True, for vLLM's may fail."""
        return await self._ask("reset_prefix_cache")

    async def start_profile(self, directory: str | os.PathLike[str] | None = None) -> None:
        """As of :meth:`reprise.LLM.start_profile`."""
        await self._ask("start_profile", plain_path(directory))

    async def stop_profile(self) -> Path:
        """As of :meth:`reprise.LLM.stop_profile`."""
        return await self._ask("stop_profile")

    def shutdown(self) -> None:
        """Abort all requests, stop the engine's thread and free the device's memory."""
        self._driver.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def __getattr__(self, name: str) -> Any:
        if name in ASYNC_METHODS:
            raise UnsupportedError(f"AsyncLLM.{name}: {ASYNC_METHODS[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    async def _ask(self, name: str, *arguments: Any) -> Any:
        asked: Future[Any] = self._driver.ask(name, *arguments)
        return together(name, await asyncio.wrap_future(asked))


def _own(params: Any) -> Any:
    """A copy: the caller may change his before the engine's thread takes them."""
    return params.clone() if isinstance(params, SamplingParams) else params


class _Stream:
    """Hands what is new from the engine's thread to one coroutine."""

    texts = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ready = asyncio.Event()
        self._final_only = False
        self._deltas: deque[RequestOutput] = deque()
        self._error: Exception | None = None

    def accepted(self, group: Acceptance) -> None:
        self._final_only = group.params.output_kind is RequestOutputKind.FINAL_ONLY

    @property
    def wants_more(self) -> bool:
        return not self._final_only and not self._deltas

    def put(self, delta: RequestOutput) -> None:
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


def _wake_all(streams: Sequence[_Stream]) -> None:
    """Waking a loop takes a system call, so its streams are woken together."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
    for each in streams:
        by_loop.setdefault(each.loop, []).append(each)
    for loop, woken in by_loop.items():
        _wake(loop, woken)


def _wake(loop: asyncio.AbstractEventLoop, streams: Sequence[_Stream]) -> None:
    """Have the coroutines look at what was put for them."""

    def wake() -> None:
        for each in streams:
            each.ready.set()

    try:
        loop.call_soon_threadsafe(wake)
    except RuntimeError:
        logger.debug("the event loop of a stream was closed; its output is dropped")


def _name(request_id: Any) -> str:
    if not isinstance(request_id, str):
        raise RequestError(f"request_id={shown(request_id)}: give a string")
    name: str = plain(request_id)
    return name

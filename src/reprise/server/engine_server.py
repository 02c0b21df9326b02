"""Answers HTTP processes: requests for the engine's thread, and questions beside generation."""

from __future__ import annotations

import functools
import logging
import selectors
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from reprise.config import EngineConfig
from reprise.engine import CompletionGroup, EngineThread, chat_prompt
from reprise.engine.prompt import PreparedPrompt, encode
from reprise.errors import RepriseError, RequestError
from reprise.sampling_params import RequestOutputKind, SamplingParams
from reprise.server import wire
from reprise.server.channel import Channel, WireReader, flush_all
from reprise.server.facts import Emissions, engine_facts, graph_facts, metric_facts
from reprise.server.token_bytes import TokenBytes

logger = logging.getLogger(__name__)


class QueueFull(RepriseError):
    """Too much waits: try again later."""


class QueueLimits(NamedTuple):
    """What may wait for the engine; None: any number."""

    requests: int | None = None
    tokens: int | None = None
    """Of prompts, once for each completion."""


class EngineServer:
    """Answers the messages of HTTP processes.

    Args:
        config: Of the engine.
        limits: Of what waits.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(self, config: EngineConfig, limits: QueueLimits) -> None:
        self.thread = EngineThread(config, flush_all)
        self._limits = limits
        self._texts = TokenBytes(self.thread.engine.tokenizer)
        self.hello = wire.Hello(wire.PROTOCOL, engine_facts(self.thread.engine))
        self._emissions = Emissions()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._new: list[socket.socket] = []
        self._to_watch: list[Channel] = []
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, None)
        self._channels: list[Channel] = []
        self._names = 0
        self._stopping = False

    # ---- any thread ------------------------------------------------------------------------

    def connect(self, connection: socket.socket) -> None:
        """Serve an HTTP process."""
        with self._lock:
            self._new.append(connection)
        self._wake()

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stopping = True
        self._wake()

    def _watch(self, channel: Channel) -> None:
        with self._lock:
            self._to_watch.append(channel)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"x")
        except BlockingIOError:
            pass  # it is awake
        except OSError:
            logger.debug("the process is ending")

    # ---- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`, or until the engine's thread has ended.

        Raises:
            RepriseError: It has.
        """
        threading.Thread(target=self._await_end, name="reprise-watch", daemon=True).start()
        while not self._stopping and self.thread.closed is None:
            for key, events in self._selector.select():
                channel = key.data
                if channel is None:
                    self._woken()
                    continue
                if events & selectors.EVENT_WRITE:
                    channel.send_rest()
                    if not channel.blocked:
                        self._selector.modify(channel.connection, selectors.EVENT_READ, channel)
                if events & selectors.EVENT_READ:
                    self._read(channel)
        if not self._stopping:
            raise RepriseError(self.thread.closed)
        self.thread.shutdown()

    def _await_end(self) -> None:
        self.thread.join()
        self._wake()

    def _woken(self) -> None:
        try:
            self._wake_receiver.recv(4096)
        except BlockingIOError:
            return
        with self._lock:
            new, self._new = self._new, []
            blocked, self._to_watch = self._to_watch, []
        for connection in new:
            connection.setblocking(False)
            channel = Channel(connection, self._emissions, self._watch)
            self._channels.append(channel)
            self._selector.register(connection, selectors.EVENT_READ, channel)
            channel.send(self.hello)
        for channel in blocked:
            if channel in self._channels:
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self._selector.modify(channel.connection, both, channel)

    def _read(self, channel: Channel) -> None:
        try:
            received = channel.connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop(channel)
            return
        for message in channel.frames.feed(received):
            if isinstance(message, wire.Generate):
                self._generate(channel, message)
            elif isinstance(message, wire.Leave):
                reader = channel.readers.pop(message.number, None)
                if reader is not None:
                    self.thread.leave(reader.name, reader)
            else:
                self._call(channel, message)

    def _drop(self, channel: Channel) -> None:
        """An HTTP process is gone, and with it all its callers."""
        self._selector.unregister(channel.connection)
        self._channels.remove(channel)
        channel.close()
        readers = list(channel.readers.values())
        channel.readers.clear()
        for each in readers:
            self.thread.leave(each.name, each)
        if readers:
            logger.warning("an HTTP process is gone: its %d request(s) are aborted", len(readers))

    def _generate(self, channel: Channel, request: wire.Generate) -> None:
        limit = self._limits.requests
        if limit is not None and self.thread.num_waiting >= limit:
            full = QueueFull(f"{limit} requests are waiting (max_num_queued_reqs): try again later")
            self._refuse(channel, request.number, full)
            return
        self._names += 1
        reader = WireReader(channel, request, f"request-{self._names}", self._texts)
        channel.readers[request.number] = reader
        try:
            accepted = self.thread.submit(
                reader.name,
                self._prompt(request),
                _params(request.params),
                request.priority,
                reader,
                self._admit,
            )
        except RepriseError as error:
            self._refuse(channel, request.number, error)
            return
        accepted.add_done_callback(functools.partial(self._answer_acceptance, channel, request))

    def _admit(self, prompt: PreparedPrompt, completions: int) -> None:
        """In the engine's thread: so that nothing comes between the question and the answer, and
        prompts that are being tokenized count before they wait."""
        limit, waiting = self._limits.tokens, self.thread.engine.scheduler.num_waiting_tokens
        count = len(prompt.token_ids) * completions
        if limit is not None and waiting and waiting + count > limit:
            raise QueueFull(
                f"{waiting} prompt tokens are waiting, and with the {count} of this request there "
                f"would be more than {limit} (max_num_queued_tokens): try again later"
            )

    def _answer_acceptance(
        self, channel: Channel, request: wire.Generate, accepted: Future[CompletionGroup]
    ) -> None:
        error = None if accepted.cancelled() else accepted.exception()
        if error is not None:
            self._refuse(channel, request.number, error)

    def _refuse(self, channel: Channel, number: int, error: BaseException) -> None:
        channel.readers.pop(number, None)
        channel.send(wire.Refused(number, type(error).__name__, str(error)))

    def _prompt(self, request: wire.Generate) -> Callable[[], Any]:
        tokenizer = self.thread.engine.tokenizer
        if request.chat is None:
            plain = dict(request.prompt or {})
            if plain.pop("add_special_tokens", True) or tokenizer is None:
                return lambda: plain
            return lambda: {
                **plain,
                "prompt_token_ids": encode(tokenizer, plain["prompt"], add_special_tokens=False),
            }
        chat = request.chat
        salt = chat.pop("cache_salt", None)

        def prompt() -> Any:
            found: dict[str, Any] = dict(chat_prompt(tokenizer, **chat))
            if salt is not None:
                found["cache_salt"] = salt
            return found

        return prompt

    # ---- calls -----------------------------------------------------------------------------

    def _call(self, channel: Channel, call: wire.Call) -> None:
        function = getattr(self, f"_do_{call.what}")
        try:
            answer: Future[Any] = function(**call.arguments)
        except RepriseError as error:
            self._refuse(channel, call.number, error)
            return

        def reply(done: Future[Any]) -> None:
            error = done.exception()
            if error is not None:
                channel.send(wire.Refused(call.number, type(error).__name__, str(error)))
            else:
                channel.send(wire.Reply(call.number, done.result()))

        answer.add_done_callback(reply)

    def _do_abort(self, name: str) -> Future[int]:
        names = [
            reader.name
            for channel in self._channels
            for reader in list(channel.readers.values())
            if reader.called == name
        ]
        for each in names:
            self.thread.abort(each)
        return self.thread.call(lambda: len(names))

    def _do_metrics(self) -> Future[Any]:
        return self.thread.call(
            functools.partial(metric_facts, self.thread.engine, self._emissions)
        )

    def _do_graphs(self) -> Future[Any]:
        return self.thread.call(functools.partial(graph_facts, self.thread.engine))

    def _do_load(self) -> Future[int]:
        return _done(sum(len(each.readers) for each in self._channels))

    def _do_tokenize(self, **arguments: Any) -> Future[Any]:
        return self.thread.tokenize(functools.partial(self._tokenize, **arguments))

    def _tokenize(
        self,
        prompt: str | None,
        chat: dict[str, Any] | None,
        add_special_tokens: bool,
        return_token_strs: bool,
    ) -> dict[str, Any]:
        engine = self.thread.engine
        if engine.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        if chat is not None:
            ids = chat_prompt(engine.tokenizer, **chat)["prompt_token_ids"]
        else:
            assert prompt is not None
            ids = encode(engine.tokenizer, prompt, add_special_tokens=add_special_tokens)
        names = engine.tokenizer.convert_ids_to_tokens(ids) if return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": engine.max_model_len,
            "tokens": ids,
            "token_strs": names,
        }

    def _do_detokenize(self, tokens: list[int]) -> Future[Any]:
        return self.thread.tokenize(lambda: self._detokenize(tokens))

    def _detokenize(self, tokens: list[int]) -> str:
        engine = self.thread.engine
        if engine.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        wrong = [each for each in tokens if not 0 <= each < engine.vocab_size]
        if wrong:
            raise RequestError(
                f"tokens contains {wrong[0]}: the vocabulary has ids 0 to {engine.vocab_size - 1}"
            )
        return self._texts.text(tokens)


def _params(given: dict[str, Any]) -> SamplingParams:
    bias = given.get("logit_bias")
    return SamplingParams(
        **{
            **given,
            "output_kind": RequestOutputKind[given["output_kind"]],
            "logit_bias": bias and {int(token): each for token, each in bias.items()},
        }
    )


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future

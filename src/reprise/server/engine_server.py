"""Answers HTTP processes: requests for the driver, and questions beside generation."""

from __future__ import annotations

import functools
import logging
import marshal
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from reprise.config import EngineConfig
from reprise.engine import Acceptance, chat_prompt, together
from reprise.engine.driver import gather, then
from reprise.engine.prompt import PreparedPrompt, TokensPrompt, encode
from reprise.engine.service import EngineService
from reprise.engine.submission import PreparedParams
from reprise.engine.tokenizing import is_long
from reprise.errors import RepriseError, RequestError
from reprise.processes.channel import Channel, flush_all
from reprise.replicas import drive
from reprise.sampling_params import RequestOutputKind, SamplingParams
from reprise.server import wire
from reprise.server.facts import Emissions, engine_facts, metric_facts
from reprise.server.live.sample import sample
from reprise.server.responses.store import ResponseStore
from reprise.server.token_bytes import TokenBytes
from reprise.server.truncation import fitting
from reprise.server.wire_reader import WireReader

logger = logging.getLogger(__name__)

MOST_QUICK = 1 << 15
"""Token ids of a prompt that are looked through between two steps: a millisecond or two."""


class QueueFull(RepriseError):
    """Too much waits: try again later."""


class EngineLimits(NamedTuple):
    """What waits for the engine, and what is kept with it."""

    requests: int | None = None
    """That may wait; None: any number."""
    tokens: int | None = None
    """Of prompts that wait, once for each completion; None: any number."""
    response_bytes: int = 0
    """Of responses."""


class EngineServer(EngineService):
    """Answers the messages of HTTP processes.

    Args:
        config: Of the engine, or the engines.
        limits: Of what waits, and of what is kept.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(self, config: EngineConfig, limits: EngineLimits) -> None:
        super().__init__(drive(config, flush_all))
        self._limits = limits
        self._frontend = self.driver.frontend
        self._texts = TokenBytes(self._frontend.tokenizer)
        self._hello = wire.Hello(wire.PROTOCOL, engine_facts(self._frontend))
        self._emissions = Emissions()
        self._names = 0
        self._latest: tuple[bytes, PreparedParams] | None = None
        """Parameters that were prepared last: those of a burst are mostly equal, and to check them
        takes as long as all else that is done here for a request."""
        self._responses = ResponseStore(limits.response_bytes)

    def hello(self) -> wire.Hello:
        return self._hello

    def channel(self, connection: socket.socket) -> Channel:
        return Channel(connection, self.watch, wire.frame, wire.Frames())

    def generate(self, channel: Channel, requests: list[wire.Generate]) -> None:
        quick: list[tuple[wire.Generate, WireReader]] = []
        for each in requests:
            self._names += 1
            name = f"request-{self._names}"
            reader = WireReader(channel, each, name, self._texts, self._emissions)
            channel.readers[each.number] = reader  # for a client that leaves early
            if _is_quick(each):
                quick.append((each, reader))
            else:
                self._submit(each, reader, prepare=False)
        # Behind each other, for the next step has all that there is time for, and one by one: a
        # step waits for no burst.
        for each, reader in quick:
            try:
                self.driver.between_steps(
                    functools.partial(self._submit, each, reader, prepare=True), more=each.more
                )
            except RepriseError as error:
                self.refuse(channel, each.number, error)

    def _submit(self, request: wire.Generate, reader: WireReader, *, prepare: bool) -> None:
        """Have a request computed; it is prepared here, or in the driver's thread for that."""
        try:
            limit = self._limits.requests
            if limit is not None and self.driver.num_waiting >= limit:
                raise QueueFull(
                    f"{limit} requests are waiting (max_num_queued_reqs): try again later"
                )
            prompt = self._prompt(request)
            accepted = self.driver.submit(
                reader.name,
                self._frontend.prepare(prompt()) if prepare else prompt,
                self._prepared(request.params) if prepare else _params(request.params),
                request.priority,
                reader,
                self._admit,
                long=not prepare and is_long(request.prompt, request.chat, request.params),
            )
        except Exception as error:  # of whatever kind: other requests go on
            if not isinstance(error, RepriseError):
                logger.exception("a request failed before the engine had it")
            self.refuse(reader.channel, request.number, error)
            return
        accepted.add_done_callback(
            functools.partial(self._answer_acceptance, reader.channel, request)
        )

    def _admit(self, prompt: PreparedPrompt, params: PreparedParams, waiting: int) -> None:
        """Prompts that are being tokenized count before they wait."""
        limit = self._limits.tokens
        count = len(prompt.token_ids) * params.params.n
        if limit is not None and waiting and waiting + count > limit:
            raise QueueFull(
                f"{waiting} prompt tokens are waiting, and with the {count} of this request there "
                f"would be more than {limit} (max_num_queued_tokens): try again later"
            )

    def _answer_acceptance(
        self, channel: Channel, request: wire.Generate, accepted: Future[Acceptance]
    ) -> None:
        error = None if accepted.cancelled() else accepted.exception()
        if error is not None:
            self.refuse(channel, request.number, error)

    def _prepared(self, given: dict[str, Any]) -> PreparedParams:
        # Bytes tell 1 from True, which is refused; version 2 has nothing of an object's history.
        same = marshal.dumps(given, 2)
        if self._latest is None or self._latest[0] != same:
            self._latest = same, self._frontend.prepare_params(_params(given))
        return self._latest[1]

    def _prompt(self, request: wire.Generate) -> Callable[[], Any]:
        tokenizer = self._frontend.tokenizer
        if request.chat is None:
            plain = dict(request.prompt or {})
            if plain.pop("add_special_tokens", True) or tokenizer is None:
                return lambda: plain
            return lambda: {
                **plain,
                "prompt_token_ids": encode(tokenizer, plain["prompt"], add_special_tokens=False),
            }
        chat = request.chat
        salt, most = chat.get("cache_salt"), chat.get("most_tokens")

        def render(messages: Any) -> TokensPrompt:
            return rendered(tokenizer, {**chat, "messages": messages})

        def prompt() -> Any:
            messages = chat["messages"]
            whole = render(messages) if most is None else fitting(messages, most, render)
            found: dict[str, Any] = dict(whole)
            if salt is not None:
                found["cache_salt"] = salt
            return found

        return prompt

    def _drop(self, channel: Channel) -> None:
        # Copied at once: the driver's thread takes out whose requests end.
        self._responses.forget([each.called for each in list(channel.readers.values())])
        super()._drop(channel)

    # ---- calls -----------------------------------------------------------------------------

    def call(self, call: wire.Call) -> Future[Any]:
        answer: Future[Any] = getattr(self, f"_do_{call.what}")(**call.arguments)
        return answer

    def _do_abort(self, name: str) -> Future[int]:
        names = [
            reader.name
            for channel in self.channels
            for reader in list(channel.readers.values())
            if reader.called == name
        ]
        ended = [self.driver.abort(each) for each in names]
        return then(gather(ended), lambda _: len(names))

    def _do_response(self, **question: Any) -> Future[Any]:
        """See :meth:`ResponseStore.answer`."""
        return _done(self._responses.answer(**question))

    def _do_metrics(self) -> Future[Any]:
        return then(self._observed(), lambda found: metric_facts(*found))

    def _observed(self) -> Future[tuple[Any, ...]]:
        """The arguments of :func:`metric_facts`."""
        asked = [self.driver.ask(name) for name in ("stats", "metrics", "graph_report")]
        return then(gather(asked), lambda found: (self._frontend.config, self._emissions, *found))

    def _do_live(self) -> Future[Any]:
        """See :func:`reprise.server.live.sample.sample`."""
        return then(self._observed(), lambda found: sample(*found))

    def _do_graphs(self) -> Future[Any]:
        """What is known of every captured graph."""
        return then(
            self.driver.ask("graph_report"),
            lambda found: together("graph_report", found).to_dict(),
        )

    def _do_load(self) -> Future[int]:
        return _done(sum(len(each.readers) for each in self.channels))

    def _do_tokenize(self, **arguments: Any) -> Future[Any]:
        return self.driver.tokenize(
            functools.partial(self._tokenize, **arguments), long=is_long(arguments)
        )

    def _tokenize(
        self,
        prompt: str | None,
        chat: dict[str, Any] | None,
        add_special_tokens: bool,
        return_token_strs: bool,
    ) -> dict[str, Any]:
        engine = self._frontend
        if engine.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        if chat is not None:
            ids = rendered(engine.tokenizer, chat)["prompt_token_ids"]
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
        return self.driver.tokenize(lambda: self._detokenize(tokens), long=is_long(tokens))

    def _detokenize(self, tokens: list[int]) -> str:
        engine = self._frontend
        if engine.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        wrong = [each for each in tokens if not 0 <= each < engine.vocab_size]
        if wrong:
            raise RequestError(
                f"tokens contains {wrong[0]}: the vocabulary has ids 0 to {engine.vocab_size - 1}"
            )
        return self._texts.text(tokens)


_BESIDE = ("add_special_tokens", "cache_salt", "most_tokens")
"""Of what is asked of a chat: all that no template is to know."""


def rendered(tokenizer: Any, chat: Mapping[str, Any]) -> TokensPrompt:
    """The prompt of a conversation.

    Args:
        tokenizer: Of the engine.
        chat: Arguments of :func:`reprise.engine.chat_prompt`; ``add_special_tokens``: with those
            that the tokenizer adds to a text, on top of what the template writes; and what says
            nothing of the prompt.

    Raises:
        RequestError: As of that function.
    """
    given = {name: value for name, value in chat.items() if name not in _BESIDE}
    found = chat_prompt(tokenizer, **given)
    if chat.get("add_special_tokens"):
        found["prompt_token_ids"] = encode(tokenizer, found["prompt"])
    return found


def _is_quick(request: wire.Generate) -> bool:
    """Nothing is to be tokenized or compiled, nor much looked through: to hand it on to another
    thread takes longer than to prepare it."""
    ids = None if request.chat is not None else (request.prompt or {}).get("prompt_token_ids")
    short = isinstance(ids, list) and len(ids) <= MOST_QUICK
    params = request.params
    simple = not params.get("structured_outputs") and not params.get("bad_words")
    return short and simple and not is_long(params)


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

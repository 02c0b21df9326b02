"""What computes requests for readers in other threads or processes: one engine, or several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from reprise.engine.engine import Engine
from reprise.engine.frontend import Frontend
from reprise.engine.prompt import PreparedPrompt
from reprise.engine.submission import PreparedParams
from reprise.errors import ordinary
from reprise.outputs import RequestOutput
from reprise.sampling_params import SamplingParams

T = TypeVar("T")

Admit = Callable[[PreparedPrompt, PreparedParams, int], None]
"""Asked with a request, tokenized, and the number of prompt tokens that wait, before an engine gets
it; raises to refuse it. Nothing comes between the question and the answer."""


class Acceptance(Protocol):
    """What is known of a request that an engine has."""

    @property
    def prompt(self) -> str | None:
        """If it was given as text."""

    @property
    def prompt_token_ids(self) -> list[int]: ...

    @property
    def params(self) -> SamplingParams: ...


class TextReader(Protocol):
    """Takes in nearly every step what costs least to make."""

    def put_text(self, text: str, token_ids: list[int]) -> None:
        """What is new of a request, of which nothing else is to be said."""


class Reader(Protocol):
    """Gets what is new of one request. The driver's thread calls it."""

    def accepted(self, group: Any) -> None:
        """An engine has the request, an :class:`Acceptance`; before any delta."""

    @property
    def texts(self) -> TextReader | None:
        """Takes what is nothing but a text and its tokens; None: it is put as a delta."""

    @property
    def wants_more(self) -> bool:
        """What was put last has been taken. Until then a request's news gather."""

    def put(self, delta: RequestOutput) -> None:
        """What is new; the one that finishes the request comes in any case."""

    def fail(self, error: Exception) -> None:
        """Nothing more comes."""


class Driver(Protocol):
    """Computes requests. Any thread may call it."""

    @property
    def frontend(self) -> Frontend:
        """What requests are checked against."""

    @property
    def engine(self) -> Engine:
        """What computes.

        Raises:
            ConfigError: It is in another process.
        """

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
        """Have a request computed.

        Args:
            request_id: Unique among the unfinished ones.
            prompt: Makes the prompt; called in a thread that tokenizes, for which one that is
                prepared, like its parameters, does not wait.
            params: None: as the checkpoint recommends.
            priority: Lower is more urgent.
            reader: Gets the outputs. :meth:`leave` when it wants no more.
            admit: May refuse it.
            long: As :func:`reprise.engine.tokenizing.is_long` says of what prompt and parameters
                are made of: others are not to wait while they are.

        Returns:
            An :class:`Acceptance`, when an engine has the request; or its exception says why it was
            refused.

        Raises:
            RepriseError: The driver has ended.
        """

    def between_steps(self, function: Callable[[], None], *, more: bool = False) -> None:
        """Run it where requests are computed, if that is in this process: what takes a while beside
        a step's launches, each of which lets other threads go on, makes them many times longer.

        Args:
            function: Raises nothing.
            more: Others are to come in a moment: where nothing runs, the next step may wait for
                them a little, since a request that just misses a step waits for all of it.

        Raises:
            RepriseError: The driver has ended.
        """

    def abort(self, request_id: str) -> Future[None]:
        """End a request; its reader gets a last delta with finish reason ``abort``."""

    def leave(self, request_id: str, reader: Reader) -> None:
        """The reader wants no more; its request ends if it has not."""

    def tokenize(self, function: Callable[[], T], *, long: bool = False) -> Future[T]:
        """Run in a thread that tokenizes; ``long`` as of :meth:`submit`.

        Raises:
            RepriseError: The driver has ended.
        """

    def ask(self, name: str, *arguments: Any) -> Future[list[Any]]:
        """Ask every engine one of :data:`reprise.engine.questions.QUESTIONS`, between two steps.

        Raises:
            RepriseError: The driver has ended.
        """

    @property
    def num_waiting(self) -> int:
        """Requests that compute nothing yet; completions of one count one by one."""

    @property
    def closed(self) -> str | None:
        """Why nothing more is accepted; None: all is well."""

    def shutdown(self) -> None:
        """Abort all requests, end what was started and free the devices' memory."""

    def drop(self) -> None:
        """As :meth:`shutdown`, of a driver that is not used any more, without waiting for anything:
        garbage collection calls this, in any thread and in the midst of anything."""

    def join(self) -> None:
        """Wait for its end."""


def gather(asked: Sequence[Future[Any]]) -> Future[list[Any]]:
    """All results, when all are there; or the first exception of theirs."""
    answer: Future[list[Any]] = Future()
    left = len(asked)
    lock = threading.Lock()

    def one_more(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left > 0:
                return
        settle(answer, lambda: [each.result() for each in asked])

    if not asked:
        answer.set_result([])
    for each in asked:
        each.add_done_callback(one_more)
    return answer


def then(asked: Future[Any], make: Callable[[Any], T]) -> Future[T]:
    """What is made of an answer, when it is there."""
    answer: Future[T] = Future()
    asked.add_done_callback(lambda done: settle(answer, lambda: make(done.result())))
    return answer


def settle(future: Future[T], result: Callable[[], T]) -> None:
    """Give a future its result, or what that raises; unless no caller waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(result())
    except BaseException as error:
        future.set_exception(ordinary(error))


def refuse(future: Future[Any], error: Exception) -> None:
    """The same with an exception."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)

"""What callers await of replicas: requests and answers."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from reprise.engine import Reader
from reprise.engine.driver import refuse
from reprise.errors import RepriseError, RequestError
from reprise.replicas.request import Request
from reprise.replicas.router import Route, Router


class Outstanding:
    """Everything that callers wait for, until it has come or :meth:`close` says that it never will.
    Any thread may call, :attr:`lock` makes several calls one.

    Args:
        router: Chooses a replica for each request, and hears of its end.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.lock = threading.RLock()
        self.closed: str | None = None
        """Why nothing is accepted any more."""
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._names: dict[str, int] = {}
        self._preparing: dict[Reader, tuple[str, bool]] = {}
        """Request ids of those that are being tokenized, and whether they were aborted."""
        self._asked: dict[int, Future[Any]] = {}
        """Questions by number."""

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Under the lock, and not closed during the ``with`` block.

        Raises:
            RepriseError: It is closed.
        """
        with self.lock:
            if self.closed is not None:
                raise RepriseError(self.closed)
            yield

    # ---- while it is tokenized ---------------------------------------------------------------

    def prepare(self, reader: Reader, request_id: str) -> None:
        """A request is going to be tokenized, for this reader."""
        self._preparing[reader] = (request_id, False)

    def is_preparing(self, reader: Reader) -> bool:
        """Whether the reader's request is not sent yet, and was not dropped."""
        return reader in self._preparing

    def prepared(self, reader: Reader) -> bool:
        """The reader's request is tokenized, or refused. Returns whether it was aborted
        meanwhile."""
        with self.lock:
            _, aborted = self._preparing.pop(reader, ("", False))
            return aborted

    def abort_prepared(self, request_id: str) -> None:
        """Abort a request as soon as it is tokenized, if it is not."""
        with self.lock:
            for reader, (name, _) in self._preparing.items():
                if name == request_id:
                    self._preparing[reader] = (name, True)

    # ---- while it is computed ----------------------------------------------------------------

    def refuse_known(self, request_ids: Sequence[str]) -> None:
        """Refuse names of unfinished requests.

        Raises:
            RequestError: One is.
        """
        for each in request_ids:
            if each in self._names:
                raise RequestError(f"request_id={each!r} is already running; give a new one")

    def add(self, request: Request) -> Route:
        """A request is going to be sent. Returns where to."""
        prompt, params = request.prepared
        route = self.router.choose(
            prompt.token_ids, prompt.cache_salt, params.params.n, params.params.max_tokens
        )
        request.number, request.route = next(self._numbers), route
        self._requests[request.number] = request
        self._names[request.request_id] = request.number
        return route

    def request(self, number: int) -> Request | None:
        """The unfinished request of this number."""
        return self._requests.get(number)

    def named(self, request_id: str) -> Request | None:
        """The unfinished request of this name."""
        return self._requests.get(self._names.get(request_id, 0))

    def began(self, request: Request) -> None:
        """The request's first token has come."""
        if request.waits:
            request.waits = False
            assert request.route is not None
            self.router.began(request.route)

    def forget(self, request: Request) -> Route:
        """The request has ended, or its reader has dropped it. Returns where it was."""
        with self.lock:
            del self._requests[request.number]
            if self._names.get(request.request_id) == request.number:
                del self._names[request.request_id]
            assert request.route is not None
            tokens: Sequence[int] = ()
            if request.params.n == 1:
                tokens = [*request.prompt_token_ids, *request.output]
            self.router.ended(request.route, tokens, request.prepared[0].cache_salt)
            return request.route

    # ---- questions ---------------------------------------------------------------------------

    def ask(self) -> tuple[int, Future[Any]]:
        """A question is going to be sent: its number, and its answer."""
        number: int = next(self._numbers)
        future: Future[Any] = Future()
        self._asked[number] = future
        return number, future

    def answered(self, number: int) -> Future[Any] | None:
        """The caller that awaits the answer that has come; None: none does."""
        with self.lock:
            return self._asked.pop(number, None)

    # ---- all of it ---------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Completions of which no token has come."""
        with self.lock:
            waiting = [each for each in self._requests.values() if each.waits]
            return len(self._preparing) + sum(each.params.n for each in waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of waiting prompts, without those that are being tokenized."""
        waiting = [each for each in self._requests.values() if each.waits]
        return sum(len(each.prompt_token_ids) * each.params.n for each in waiting)

    def close(self, reason: str) -> None:
        """Nothing comes any more: let no caller wait."""
        with self.lock:
            self.closed = reason
            requests, self._requests = list(self._requests.values()), {}
            asked, self._asked = list(self._asked.values()), {}
            self._names.clear()
        for request in requests:
            fail(request, RepriseError(reason))
        for future in asked:
            refuse(future, RepriseError(reason))

    def forked(self, reason: str) -> None:
        """This process is a fork: nothing of its parent's comes here."""
        self.lock = threading.RLock()  # a thread of the parent may have held it
        self.close(reason)


def fail(request: Request, error: Exception) -> None:
    """Tell the caller that awaits a request: its reader, or the caller that waits for its
    acceptance."""
    if request.future.done():
        request.reader.fail(error)
    else:
        refuse(request.future, error)

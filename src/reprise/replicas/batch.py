"""Replicas for one caller, which waits for all outputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from reprise.config import EngineConfig
from reprise.engine import Engine, Frontend
from reprise.engine.batch import Asked, Batch, Completed, OneEngine
from reprise.engine.submission import PreparedParams, whole_priority
from reprise.errors import FailedRequestError
from reprise.outputs import RequestOutput
from reprise.progress import progress
from reprise.replicas.replicas import Replicas
from reprise.replicas.request import Request

SHOW_SECONDS = 0.2
"""Between two looks at how far the requests are."""


def batch(config: EngineConfig) -> Batch:
    """One engine that the caller's thread drives, or replicas, as the options say.

    Raises:
        RepriseError: The device, model or options do not work.
    """
    return BatchOfReplicas(config) if config.computes_elsewhere else OneEngine(config)


class BatchOfReplicas:
    """Waits for replicas.

    Args:
        config: Options of all.

    Raises:
        RepriseError: The devices, model or options do not work; no process is left.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.replicas = Replicas(config, lambda readers: None)
        # Of an LLM that is dropped, and at the end of a program that did not shut down.
        weakref.finalize(self, self.replicas.shutdown)

    @property
    def frontend(self) -> Frontend:
        return self.replicas.frontend

    @property
    def engine(self) -> Engine:
        return self.replicas.engine

    def complete(self, requests: Sequence[Asked], show: bool) -> list[Completed]:
        tally = _Tally(len(requests))
        sent, readers = [], []
        known: dict[int, PreparedParams] = {}  # often all have the same
        for each in requests:
            params = known.get(id(each.params))
            if params is None:
                params = known[id(each.params)] = self.replicas.prepare_params(each.params)
            prompt = self.replicas.prepare(each.request_id, each.prompt, params)
            reader = _Waiting(tally)
            readers.append(reader)
            urgency = whole_priority(each.priority)
            sent.append(Request(each.request_id, prompt, params, urgency, reader, whole=True))
        try:
            self.replicas.send(sent)
            for request in sent:
                request.future.add_done_callback(tally.answered)
            with progress("generating", len(sent), visible=show) as bar:
                while (left := tally.wait(SHOW_SECONDS)) > 0:
                    bar.show("generating", len(sent) - left, len(sent))
        except BaseException:
            for request in sent:
                self.replicas.leave(request.request_id, request.reader)
            raise
        return [each.completed for each in readers]

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        return self.replicas.ask(name, *arguments).result()

    def close(self) -> None:
        self.replicas.shutdown()


class _Tally:
    """How many requests are unfinished.

    Args:
        left: So many.
    """

    def __init__(self, left: int) -> None:
        self._changed = threading.Condition()
        self._left = left
        self._error: BaseException | None = None

    def wait(self, seconds: float) -> int:
        """How many there are when none is left, or after so long.

        Raises:
            Exception: One was refused, or ended with others.
        """
        with self._changed:
            if self._left and self._error is None:
                self._changed.wait(seconds)
            if self._error is not None:
                raise self._error
            return self._left

    def one_less(self) -> None:
        with self._changed:
            self._left -= 1
            if not self._left:
                self._changed.notify()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify()

    def answered(self, accepted: Future[Any]) -> None:
        """A replica has a request, or refuses it."""
        error = accepted.exception()
        if error is not None:
            self.fail(error)


class _Waiting:
    """What comes of one request, at its end.

    Args:
        tally: Of all.
    """

    texts = None
    wants_more = False

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self._completed: Completed | None = None

    @property
    def completed(self) -> Completed:
        """When it is over."""
        assert self._completed is not None
        return self._completed

    def accepted(self, group: Any) -> None:
        """No caller waits for that."""

    def put(self, delta: RequestOutput) -> None:
        self._completed = delta, None
        self._tally.one_less()

    def fail(self, error: Exception) -> None:
        if isinstance(error, FailedRequestError) and error.outputs:
            self._completed = error.outputs[0], error
            self._tally.one_less()
        else:
            self._tally.fail(error)

"""What completes many requests for one caller, which waits for all: one engine, or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from reprise.config import EngineConfig
from reprise.engine.completion import CompletionGroup
from reprise.engine.engine import Engine
from reprise.engine.frontend import Frontend
from reprise.engine.questions import QUESTIONS
from reprise.engine.surroundings import plain_torch
from reprise.errors import RepriseError
from reprise.outputs import RequestOutput
from reprise.progress import progress
from reprise.sampling_params import SamplingParams


class Asked(NamedTuple):
    """A request."""

    request_id: str
    prompt: Any
    params: SamplingParams | None
    priority: int


Completed = tuple[RequestOutput, RepriseError | None]
"""All that there is of a request, and why there is not more."""


class Batch(Protocol):
    """Completes requests. One thread at a time may call it."""

    @property
    def frontend(self) -> Frontend:
        """What requests are checked against."""

    @property
    def engine(self) -> Engine:
        """What computes.

        Raises:
            ConfigError: It is in another process.
        """

    def complete(self, requests: Sequence[Asked], show: bool) -> list[Completed]:
        """Complete requests; whatever is raised, none is left.

        Args:
            requests: In any number.
            show: Show progress.

        Raises:
            RepriseError: One is refused, then nothing is generated; or an engine fails.
        """

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """The answers to one of :data:`reprise.engine.questions.QUESTIONS`, one of each engine."""

    def close(self) -> None:
        """Free the devices' memory. Nothing is computed afterwards."""


class OneEngine:
    """An engine that the caller's thread drives.

    Args:
        config: Its options.

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(self, config: EngineConfig) -> None:
        with plain_torch():
            self.engine = Engine(config)

    @property
    def frontend(self) -> Frontend:
        return self.engine

    def complete(self, requests: Sequence[Asked], show: bool) -> list[Completed]:
        engine = self.engine
        groups: list[CompletionGroup] = []
        try:
            with plain_torch():
                for each in requests:
                    groups.append(engine.add(*each))
                self._run(groups, show)
        except RepriseError:
            engine.abort([each.request_id for each in groups])
            raise
        except BaseException:
            engine.start_over()
            raise
        return [(each.output(), each.error) for each in groups]

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        with plain_torch():
            return [QUESTIONS[name].answer(self.engine, *arguments)]

    def close(self) -> None:
        self.engine.close()

    def _run(self, groups: Sequence[CompletionGroup], show: bool) -> None:
        engine = self.engine
        engine.platform.activate()  # of the calling thread, which may be a new one
        unfinished, running = list(groups), engine.num_requests
        before = engine.scheduler.num_generated_tokens
        with progress("generating", len(groups), visible=show) as bar:
            while unfinished:
                engine.step()
                if engine.num_requests != running:  # some have ended: no step asks each of them
                    running = engine.num_requests
                    unfinished = [each for each in unfinished if not each.finished]
                tokens = engine.scheduler.num_generated_tokens - before
                done = len(groups) - len(unfinished)
                bar.show(f"generating, {tokens} tokens", done, len(groups))
        engine.finish_steps()

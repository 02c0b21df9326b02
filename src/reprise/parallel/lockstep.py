"""Engines that compute different requests and share experts: their steps happen at the same time.

Each has a scheduler of its own, but a layer whose experts are spread over all of them needs all of
them in each pass. So before every step they tell each other what they have, through memory that
they share, and all run the least common plan: the same phase, padded to the largest size. One that
has nothing runs padding alone. What is decided about graphs is decided by all, as where several
ranks compute one step.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import NamedTuple

from reprise.config import EngineConfig
from reprise.distributed import ALONE, Group, Ranks
from reprise.distributed.communicator import Communicator
from reprise.errors import RanksError
from reprise.parallel.seat import Joined, Seat, join
from reprise.platforms import Platform
from reprise.shape import StepShape

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0
"""For so long an engine that ends takes part in the others' steps, until they end as well."""
_NO_LENGTH = float("-inf")


class Wish(IntEnum):
    """What an engine has to do; the largest of all wishes is done."""

    NOTHING = 0
    PROVE = 1
    """A graph could be proven further."""
    WAIT = 2
    """Results of earlier steps; then there may be more."""
    STEP = 3


class Agreed(NamedTuple):
    """What all engines do next."""

    wish: Wish
    shape: StepShape | None
    """What the step of each is laid out as and padded to, if there is one."""


class Lockstep:
    """One engine's view of all.

    Args:
        seat: Its own.
        platform: Of this engine.
    """

    def __init__(self, seat: Seat, platform: Platform) -> None:
        for each in seat.setup:
            module, _, name = each.partition(":")
            getattr(importlib.import_module(module), name)(seat.rank)
        self.rank, self.size = seat.rank, seat.size
        self.seat, self._platform = seat, platform
        self._engines = seat.meeting()
        """Where engines meet."""
        self.everyone = seat.everyone_of(0)
        """All ranks of all engines: how they decide about graphs, and what has failed."""
        self._joined: Joined | None = None
        self._awake = False
        """Some engine had something to do when all met last."""
        self.leaving = False
        """It takes part in the others' steps until they leave as well."""
        self._all_leave = False
        self._lost: RanksError | None = None
        self.waited_seconds = 0.0
        """For others, in meetings: the slowest waits least."""
        self.meetings = 0
        """Before each step, and when there was none."""
        self.empty_steps = 0
        """Steps that were others' alone."""

    def on_wake(self, call: Callable[[], None]) -> None:
        """Call this in a thread of its own when others want to meet and this engine rests."""
        self._engines.on_asked = call

    def connect(
        self, config: EngineConfig, group: Group = ALONE, beside: Communicator | None = None
    ) -> Ranks:
        """Join the others; each does so at the same time, and so do the other ranks of each.

        Args:
            config: Of this engine.
            group: Of this engine's ranks.
            beside: See :func:`reprise.parallel.seat.join`.
        """
        self._joined = join(self.seat, 0, self.everyone, self._platform, config, beside)
        return Ranks(group, self.everyone, self._joined.communicator.group)

    # ---- steps ---------------------------------------------------------------------------

    @property
    def must_meet(self) -> bool:
        """This engine may not rest: others have something to do, want to meet or are not left."""
        return self._awake or self.leaving or self._engines.is_asked

    def meet(self, wish: Wish, shape: StepShape | None = None) -> Agreed:
        """Tell all what this engine has to do, and learn what they do.

        Args:
            wish: What it has.
            shape: Of its step, if that is it.

        Raises:
            RanksError: An engine was lost.
        """
        self.check()
        mixed, length, least, tokens, requests = 0.0, 0.0, _NO_LENGTH, 0.0, 0.0
        if shape is not None:
            mixed, length, least = float(shape.phase == "mixed"), shape.query_len, -shape.query_len
            tokens, requests = shape.num_tokens, shape.num_requests
        values = [wish, not self.leaving, mixed, length, least, tokens, requests]
        began = time.perf_counter()
        try:
            found = self._engines.largest_of([float(each) for each in values])
        except Exception as error:
            silent = error.rank if isinstance(error, RanksError) else None
            if silent is None:
                self.lose(error)
                raise
            seconds = self._engines.timeout
            told = RanksError(f"engine {silent} did not answer within {seconds:.0f} s")
            told.rank = silent
            self.lose(told, engine=silent)
            raise told from error
        self.waited_seconds += time.perf_counter() - began
        self.meetings += 1
        agreed, stay, mixed, length, least, tokens, requests = found
        self._awake = agreed >= Wish.WAIT
        self._all_leave = not stay
        if agreed < Wish.STEP:
            return Agreed(Wish(int(agreed)), None)
        self.empty_steps += shape is None
        if mixed or length != -least:
            return Agreed(Wish.STEP, StepShape.mixed(int(tokens), int(requests)))
        return Agreed(Wish.STEP, StepShape.decode(int(requests), int(length)))

    def resting(self) -> AbstractContextManager[None]:
        """In the ``with`` block this engine waits for requests: an engine that wants to meet wakes
        it."""
        return self._engines.resting()

    def check(self) -> None:
        """Raise a RanksError if an engine was lost."""
        if self._lost is not None:
            raise self._lost

    def lose(self, error: Exception, seen: int | None = None, engine: int | None = None) -> None:
        """This engine has lost step with the others: the group is over. An engine that learns of it
        from another one does not say that it has failed itself.

        Args:
            error: Why.
            seen: Its own rank that it saw end, or stand still, if that is why.
            engine: Another one that it waited for in vain, if that is why.
        """
        if seen is not None:
            self.everyone.fail(error, self.rank * self.seat.ranks + seen)
        if self._lost is not None:
            return
        if engine is not None:  # the others may not know it, and are told before they are asked
            self.everyone.fail(error, engine * self.seat.ranks)
        first = self.everyone.await_first_failure()
        if first is None and not self._engines.ended:
            self.everyone.fail(error)
            first = self.everyone.first_failure
        self._engines.fail(error, engine)  # others need not wait for this engine
        ours = first is not None and first // self.seat.ranks == self.rank
        told = f"{type(error).__name__}: {error}" if ours else str(error)
        self._lost = RanksError(f"engine {self.rank} of {self.size} has lost the others: {told}")
        self._abort()

    # ---- the end -------------------------------------------------------------------------

    def leave(self, step: Callable[[], object]) -> None:
        """Take part in what the others do until they leave as well.

        Args:
            step: Takes part once: it calls :meth:`meet`.
        """
        self.leaving = True
        until = time.monotonic() + LEAVE_SECONDS
        while not self._all_leave and time.monotonic() < until:
            step()

    def close(self) -> None:
        """No engine is met any more."""
        self._engines.end()
        self.everyone.end()
        if self._joined is not None:
            self._joined.communicator.close()
            self._joined = None

    def _abort(self) -> None:
        """Others need not wait for this engine's device in a collective."""
        if self._joined is not None:
            # It may wait for a device that never answers; no engine waits for it.
            threading.Thread(
                target=self._joined.communicator.abort, name="reprise-loss", daemon=True
            ).start()

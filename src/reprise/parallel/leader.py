"""Rank 0: the runner of the engine's process, which tells the others what it does."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import TCPStore

from reprise.config import EngineConfig
from reprise.distributed import ALONE, Group, Ranks
from reprise.distributed.communicator import Communicator, connect
from reprise.errors import RanksError, describe
from reprise.graphs import nobody
from reprise.loading import Checkpoint
from reprise.parallel.direct import prove_direct
from reprise.parallel.followers import Followers
from reprise.parallel.lockstep import Lockstep
from reprise.parallel.messages import Drawn, Kind, Start, pack, pack_shape, pickled
from reprise.parallel.processes import Processes
from reprise.parallel.remote import Elsewhere
from reprise.parallel.wire import Encoder
from reprise.platforms import Platform
from reprise.processes.launched import refuse_launcher
from reprise.runner import ModelRunner, PendingOutput, StepOutput
from reprise.runner.model_choices import shape_of
from reprise.shape import StepShape
from reprise.step import Masks, Step

T = TypeVar("T")

logger = logging.getLogger(__name__)

COMPARE_EVERY = 256
"""Steps after which ranks compare what they have drawn."""
BLAME_SECONDS = 5.0
"""After a collective failed, for so long the reason is looked for in the other processes."""
SETUP: tuple[str, ...] = ()
"""See :attr:`reprise.parallel.messages.Start.setup`."""
_numbers = itertools.count()


class Leader:
    """What the leader's process has of its followers.

    Args:
        config: How many ranks there are, and how long one may take for one message.
        platform: Of this rank.
        elsewhere: The ranks, if another program has started them; None: followers are started on
            this machine.
        lockstep: Of the engine, if it shares experts with others.

    Raises:
        ConfigError: A launcher has started this process several times.
        PlatformError: There are not so many devices, or no collectives for them.
        RanksError: Followers do not connect.
    """

    def __init__(
        self,
        config: EngineConfig,
        platform: Platform,
        elsewhere: Elsewhere | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        size, timeout = config.tensor_parallel_size, config.patience
        self.size, self.platform, self._timeout = size, platform, timeout
        self._lockstep = lockstep
        name = f"tensor-{os.getpid()}-{next(_numbers)}"
        self._followers: Followers
        if elsewhere is None:
            refuse_launcher("tensor_parallel_size", size)
            self._devices = tuple(platform.device_of(rank, size) for rank in range(size))
            self.devices = self._devices
            self.group = Group(name, 0, size)
            logger.info("ranks: starting %d follower(s) on %s", size - 1, platform.name)
            keep = () if lockstep is None else lockstep.seat.inherited
            self._followers = Processes(size, timeout, keep)
        else:
            self._devices = tuple(each.device for each in elsewhere.ranks)
            self.devices = tuple(
                f"{each.device} on {each.host.address}" for each in elsewhere.ranks
            )
            self.group = Group(name, 0, size, tuple(each.host for each in elsewhere.ranks))
            self._followers = elsewhere.followers(timeout)
        self._when_lost: Callable[[], None] = lambda: None
        # The followers are watched by a thread, and with them this would live until the end of the
        # program, whichever code drops it.
        here = weakref.ref(self)
        self._followers.on_loss = lambda: _told_of(here, Leader._lose)
        self._followers.report = lambda: _told_of(here, Leader._report) or ""
        self._communicator: Communicator | None = None
        self._store: Any = None
        self._last = "none"
        self.retired = 0
        """Steps whose results were waited for."""
        self.drawn = Drawn()
        """In these steps."""
        self._compared = 0
        self._finalizer = weakref.finalize(self, self._followers.close)

    def start(self, config: EngineConfig, checkpoint: Checkpoint) -> Ranks:
        """Have all followers make their runners, and join them; this rank's has to be made next.

        Raises:
            ModelError: So many ranks cannot share the model.
        """
        exchange = ALONE if config.enable_expert_parallel else None
        seat = None if self._lockstep is None else self._lockstep.seat
        if seat is not None:
            exchange = seat.group_of(0)
        if self.group.hosts:
            seat = None  # the program that has started the followers gives them theirs
        shape_of(checkpoint.config, torch.bfloat16, self.group, exchange)
        group, platform = self.group, self.platform
        self._store = TCPStore(group.leader.address, 0, is_master=True, wait_for_workers=False)
        begin = Start(
            config.arguments(), self._devices, group.hosts, group.name, self._store.port,
            self._timeout, SETUP, seat,
        )  # fmt: skip
        self.say(Kind.START, pickled(begin))
        platform.share_host(group.beside)
        self._communicator = connect(
            self.group, platform.dist_backend, self._store, platform.device, self._timeout,
            direct=config.custom_all_reduce,
        )  # fmt: skip
        self._communicator.told = self._followers.board.note_calls
        prove_direct(self._communicator, platform, self._followers.board, config.ops)
        if self._lockstep is not None:
            return self._lockstep.connect(config, self.group, self._communicator)
        return Ranks(self.group, self._followers.board, exchange)

    def say(self, kind: Kind, content: bytes = b"") -> None:
        """Tell all followers.

        Raises:
            RanksError: A rank was lost.
        """
        self.check()
        board = self._followers.board
        self._last = f"number {board.sent + 1}, {kind.name.lower()}"
        try:
            self._followers.send(pack(kind, board.sent + 1, self.retired, content))
        except RanksError as error:
            raise (self._followers.cause(error, BLAME_SECONDS) or error) from error

    def compare(self) -> None:
        """Have the followers compare what they have drawn, once in some steps."""
        if self.retired - self._compared >= COMPARE_EVERY:
            self._compared = self.retired
            self.say(Kind.SAME, pickled(self.drawn.checksum))

    def _report(self) -> str:
        return f"the leader's last one was {self._last}"

    def _lose(self) -> None:
        """A rank was lost."""
        lost, missing = self._followers.lost, self._followers.missing
        if self._lockstep is not None and lost is not None:
            self._lockstep.lose(lost, missing)
        self._when_lost()
        if self._communicator is not None:
            self._communicator.abort()

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call this in a thread of its own when a rank is lost, or now."""
        self._when_lost = call
        if self._followers.lost is not None:
            call()

    def check(self) -> None:
        """Raise a RanksError if a rank was lost."""
        if self._followers.lost is not None:
            raise self._followers.lost

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do at once, to its end: an interruption waits, and what fails ends all.

        Raises:
            RanksError: It did.
        """
        with _uninterrupted():
            try:
                yield
            except Exception as error:
                if self._lockstep is not None:
                    self._lockstep.lose(error)  # they are told at once, and by when it was
                cause = self._followers.cause(error, BLAME_SECONDS)
                if cause is None:
                    cause = RanksError(
                        f"rank 0 failed ({describe(error)}) and has lost step with the others; "
                        "create a new engine"
                    )
                    self._followers.give_up(cause)
                raise cause from error
        self.check()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Building this rank's runner: what fails ends all followers, and is raised as it is if
        they are not the reason."""
        try:
            yield
        except BaseException as error:
            seconds = 1.0 if isinstance(error, Exception) else 0.0
            cause = None
            if isinstance(error, RanksError | RuntimeError):
                cause = self._followers.cause(error, seconds)
            self.close()
            if cause is None:
                raise
            told = cause.__cause__
            raise (cause if told is None else _as_told(cause, told)) from error

    def close(self, until: float | None = None) -> None:
        """End the followers, those that are not gone by then and, by default, all at once; nothing
        of them is left."""
        self._finalizer.detach()
        if self._followers.are_of_parent:
            return
        number = self._followers.board.sent + 1
        stop = pack(Kind.STOP, number, self.retired)
        if until is None:
            self._followers.close()
        else:
            self._followers.close(lambda: self._followers.send(stop), until)
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None
        self._store = None


class LeadingRunner(ModelRunner):
    """The runner of rank 0. Whatever changes its state, it tells the followers first.

    Args:
        config: Validated options.
        platform: Of this rank.
        checkpoint: What to load.
        leader: Of the followers, started.
        ranks: What :meth:`Leader.start` gave.
    """

    def __init__(
        self,
        config: EngineConfig,
        platform: Platform,
        checkpoint: Checkpoint,
        leader: Leader,
        ranks: Ranks,
    ) -> None:
        self._leader = leader
        self._encoder = Encoder()
        super().__init__(config, platform, checkpoint, ranks)

    def submit(self, step: Step, at_least: StepShape | None = None) -> None:
        kind, content = Kind.STEP, self._encoder.encode(step)
        if at_least is not None:
            kind, content = Kind.STEP_AMONG, pack_shape(at_least) + content
        with self._leader.together():
            self._leader.compare()
            self._leader.say(kind, content)
            super().submit(step, at_least)

    def sample(self, step: Step, masks: Masks | None = None) -> PendingOutput:
        with self._leader.together():
            content = b"" if masks is None else pickled(masks)
            self._leader.say(Kind.SAMPLE, content)
            pending = super().sample(step, masks)
        return _Counted(pending, self._leader)

    def forget_steps(self) -> None:
        self._leader.say(Kind.FORGET)
        super().forget_steps()

    def forget_draws(self) -> None:
        self._leader.say(Kind.FORGET_DRAWS)
        super().forget_draws()

    def prove_more(self, wanted: Callable[[], bool] = nobody) -> bool:
        with self._leader.together():
            self._leader.say(Kind.PROVE)
            return super().prove_more(wanted)

    def check(self) -> None:
        self._leader.check()

    def when_lost(self, call: Callable[[], None]) -> None:
        self._leader.when_lost(call)

    def close(self, until: float) -> None:
        self._leader.close(until)


class _Counted(PendingOutput):
    """A result that the followers are told to have been waited for."""

    def __init__(self, pending: PendingOutput, leader: Leader) -> None:
        self._pending, self._leader = pending, leader

    def wait(self) -> StepOutput:
        output = self._pending.wait()
        self._leader.check()  # the device may have been made to give up waiting for a lost rank
        self._leader.retired += 1
        self._leader.drawn.note(output.sampled)
        return output


def _told_of(leader: weakref.ref[Leader], of: Callable[[Leader], T]) -> T | None:
    """What a leader says or does, if there still is one."""
    found = leader()
    return None if found is None else of(found)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the ``with`` block has ended: other ranks go on, and would wait for this
    one in a collective."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _as_told(cause: RanksError, told: BaseException) -> BaseException:
    """A typed error of another rank as one of this."""
    from reprise.distributed.board import failed

    rank = str(cause).split(maxsplit=2)[1]
    return failed(int(rank), told)

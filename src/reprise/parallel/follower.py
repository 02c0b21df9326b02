"""Ranks 1 and up: do what the leader says, in its order."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import threading
import time
from collections import deque
from functools import partial
from typing import Protocol

import torch
from torch._C._distributed_c10d import TCPStore

from reprise import platforms
from reprise.distributed import ALONE, Agreement, Ranks
from reprise.distributed.communicator import connect
from reprise.distributed.meeting import Everyone
from reprise.errors import RanksError
from reprise.loading import checkpoint_of
from reprise.ops.ahead import load_compiler, wake_compiler
from reprise.parallel.direct import prove_direct
from reprise.parallel.messages import Drawn, Kind, Start, unpack, unpack_shape
from reprise.parallel.seat import Seat, join
from reprise.parallel.wire import Decoder
from reprise.runner import ModelRunner, PendingOutput

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.25


class Board(Agreement, Protocol):
    """What a follower and the others know of each other, whatever carries it."""

    rank: int
    timeout: float
    """Seconds that a rank waits for an answer of the others."""

    @property
    def ended(self) -> bool:
        """The group is over."""

    def beat(self) -> None:
        """Say that this process runs."""

    def note_done(self, count: int) -> None:
        """Say how many messages were carried out."""

    def note_calls(self, count: int) -> None:
        """Say how many collectives this rank has begun."""


class Messages(Protocol):
    """The leader's, in its order."""

    def receive(self) -> bytes:
        """The next one, when it has come.

        Raises:
            RanksError: None will come.
        """


def follow(board: Board, messages: Messages, seat: Seat | None = None) -> None:
    """Until the leader says stop.

    Args:
        board: What is known of the others.
        messages: What the leader says.
        seat: Of the engine, if its experts are shared and the leader does not say so.

    Raises:
        Exception: This rank failed; the others have to be told.
    """
    threading.Thread(target=_beat, args=(board,), name="reprise-beat", daemon=True).start()
    # The leader waits for all to be at the table before it says anything.
    everyone = None if seat is None else seat.everyone_of(board.rank)
    kind, _, content = unpack(messages.receive(), 1)
    if kind is Kind.STOP:
        return
    if kind is not Kind.START:
        raise RanksError(f"the leader began with {kind.name} and not with START")
    start: Start = pickle.loads(content)
    if start.seat is not None:
        seat, everyone = start.seat, start.seat.everyone_of(board.rank)
    try:
        with torch.inference_mode():
            _Follower(board, messages, start, seat, everyone).run()
    except Exception as error:
        if everyone is not None and not everyone.ended:
            everyone.fail(error)
        raise


def _beat(board: Board) -> None:
    while not board.ended:
        board.beat()
        time.sleep(BEAT_SECONDS)


class _Follower:
    def __init__(
        self,
        board: Board,
        messages: Messages,
        start: Start,
        seat: Seat | None,
        everyone: Everyone | None,
    ) -> None:
        rank = board.rank
        for each in start.setup:
            module, _, name = each.partition(":")
            getattr(importlib.import_module(module), name)(rank)
        board.timeout = start.timeout
        platform = platforms.resolve(start.devices[rank])
        group = start.group_of(rank)
        if group.hosts:
            platform.share_host(group.beside)
        platform.activate()
        config = start.config
        loading = partial(load_compiler, platform)
        waking = partial(wake_compiler, platform, len(start.devices))
        with platform.warming_up(beside=loading, then=waking):
            checkpoint = checkpoint_of(config)
        store = TCPStore(group.leader.address, start.port, is_master=False)
        communicator = connect(
            group, platform.dist_backend, store, platform.device, start.timeout,
            direct=config.custom_all_reduce,
        )  # fmt: skip
        communicator.told = board.note_calls
        prove_direct(communicator, platform, board, config.ops)
        self._board, self._messages, self._store = board, messages, store
        self._decoder = Decoder()
        self._outstanding: deque[PendingOutput] = deque()
        self._retired = 0
        self._drawn = Drawn()
        ranks = Ranks(group, board, ALONE if config.enable_expert_parallel else None)
        if seat is not None:
            assert everyone is not None
            self._joined = join(seat, rank, everyone, platform, config, communicator)
            ranks = Ranks(group, everyone, self._joined.communicator.group)
        self._runner = ModelRunner(config, platform, checkpoint, ranks)
        board.note_done(1)

    def run(self) -> None:
        """Carry out messages until the last one."""
        count = 1
        while True:
            count += 1
            kind, retired, content = unpack(self._messages.receive(), count)
            if kind is Kind.STOP:
                return
            self._retire(retired)
            self._carry_out(kind, content)
            self._board.note_done(count)

    def _retire(self, retired: int) -> None:
        """Wait for the steps that the leader has waited for: both hosts know the same of them."""
        while self._retired != retired:
            self._retired = (self._retired + 1) & 0xFFFFFFFF
            if self._outstanding:
                self._drawn.note(self._outstanding.popleft().wait().sampled)

    def _carry_out(self, kind: Kind, content: bytes) -> None:
        runner = self._runner
        if kind in (Kind.STEP, Kind.STEP_AMONG):
            at_least = None
            if kind is Kind.STEP_AMONG:
                at_least, content = unpack_shape(content)
            step = self._step = self._decoder.decode(content)
            with runner.active():
                runner.submit(step, at_least)
        elif kind is Kind.SAMPLE:
            masks = pickle.loads(content) if content else None
            with runner.active():
                self._outstanding.append(runner.sample(self._step, masks))
            runner.owners.take_damages()
        elif kind is Kind.FORGET:
            self._outstanding.clear()
            runner.forget_steps()
            runner.platform.synchronize()
        elif kind is Kind.FORGET_DRAWS:
            runner.forget_draws()
        elif kind is Kind.SAME:
            if pickle.loads(content) != self._drawn.checksum:
                raise RanksError(
                    f"it has drawn other tokens than rank 0, in one of {self._retired} steps"
                )
        elif kind is Kind.PROVE:
            runner.prove_more()
            runner.owners.take_damages()
        else:
            raise RanksError(f"the leader says {kind.name}, which has no place here")


def die_with(life: int) -> None:
    """End this process when the leader's is gone: its end of the pipe closes then."""

    def watch() -> None:
        os.read(life, 1)
        os._exit(1)

    threading.Thread(target=watch, name="reprise-life", daemon=True).start()

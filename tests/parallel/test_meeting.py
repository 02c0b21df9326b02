"""Where engines meet that compute in step, on one machine and on several. Engines are threads."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from reprise.distributed import star
from reprise.distributed.board import Board, create
from reprise.distributed.meeting import SharedMeeting
from reprise.distributed.peers import FirstPeer, OtherPeer
from reprise.errors import ConfigError, RanksError
from reprise.parallel.lockstep import Lockstep, Wish
from reprise.platforms.cpu import CpuPlatform
from reprise.processes.sealed import Listener, connect, new_secret

SECONDS = 60.0
"""For what takes milliseconds."""
SIZE = 3


def through_memory() -> list[Any]:
    memory = create(Board.nbytes(SIZE, 0))
    pipes = [os.pipe() for _ in range(SIZE)]
    found = []
    for rank in range(SIZE):
        board = Board(memory, rank, SIZE, 0)
        board.timeout = SECONDS
        wakers = [-1 if other == rank else pipes[other][1] for other in range(SIZE)]
        found.append(SharedMeeting(board, pipes[rank][0], wakers))
    os.close(memory)
    return found


def through_connections() -> list[Any]:
    secret = new_secret()
    listener = Listener("127.0.0.1", secret)
    others = [connect(listener.place, f"{rank}", secret, SECONDS) for rank in range(1, SIZE)]
    first = FirstPeer({rank: listener.take(f"{rank}", SECONDS) for rank in range(1, SIZE)}, SECONDS)
    listener.close()
    return [first, *(OtherPeer(each, rank, SIZE) for rank, each in enumerate(others, 1))]


@pytest.fixture(params=[through_memory, through_connections])
def meetings(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    found = request.param()
    yield found
    for each in found:
        each.end()


@pytest.fixture
def peers() -> Iterator[list[Any]]:
    found = through_connections()
    yield found
    for each in found:
        each.end()


def by_all(meetings: list[Any], call: Callable[[int, Any], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(meetings)) as pool:
        return [each.result(SECONDS) for each in
                [pool.submit(call, *each) for each in enumerate(meetings)]]  # fmt: skip


def test_all_get_the_same_answers(meetings: list[Any]) -> None:
    values = [[[float((7 * rank + n * k) % 5) for k in (1, 2, 3)] for n in range(200)]
              for rank in range(SIZE)]  # fmt: skip
    found = by_all(
        meetings, lambda rank, meeting: [meeting.largest_of(each) for each in values[rank]]
    )
    expected = [
        [max(each) for each in zip(*said, strict=True)] for said in zip(*values, strict=True)
    ]
    assert found == [expected] * SIZE


@pytest.mark.parametrize("restless", [0, 1])
def test_who_rests_is_woken_whenever_another_one_asks(meetings: list[Any], restless: int) -> None:
    """Whatever comes first, falling asleep or the question; nobody asks twice for one answer."""

    def engine(rank: int, meeting: Any) -> list[float]:
        rng, woken, found, wishes = random.Random(rank), threading.Event(), [], 0
        meeting.on_asked = woken.set
        while True:
            if rng.random() < 0.5:
                time.sleep(rng.choice((0, 0, 1e-4)))
            wants = wishes < 60 and rng.random() < 0.3
            if not wants and wishes < 60 and not meeting.is_asked:
                with meeting.resting():
                    if not meeting.is_asked:
                        # After a while there is something to do here.
                        woken.wait(rng.choice((1e-4, 1e-3 if rank == restless else SECONDS)))
                woken.clear()
                wants = not meeting.is_asked
            wishes += wants
            found.append(meeting.largest_of([rank, float(wishes < 60)]))
            if not found[-1][1]:
                return found

    answers = by_all(meetings, engine)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) >= 60


def test_who_failed_first_is_known_to_all_and_raised_by_type(peers: list[Any]) -> None:
    peers[2].fail(ConfigError("block_size=3"))
    with pytest.raises(ConfigError, match="rank 2: block_size=3"):
        peers[1].largest_of([0.0])
    with pytest.raises(ConfigError, match="rank 2: block_size=3"):
        peers[0].largest_of([0.0])
    peers[0].fail(RuntimeError("connection closed by peer"))
    peers[1].fail(RuntimeError("connection closed by peer"), seen=0)
    assert [each.await_first_failure() for each in peers] == [2, 2, 2]


@pytest.mark.parametrize("lost", range(SIZE))
def test_whose_connection_ends_is_who_failed(peers: list[Any], lost: int) -> None:
    """For whoever waits for an answer, and for whoever fails since a collective does."""
    with ThreadPoolExecutor(1) as pool:
        asking, other = [each for rank, each in enumerate(peers) if rank != lost]
        answer = pool.submit(asking.largest_of, [0.0])
        if lost == 0:
            peers[0]._taken = lambda: None  # of one connection's end nobody is told by it
        with contextlib.suppress(OSError):
            for each in [peers[lost]._connection] if lost else [
                each.connection for each in peers[0]._others.values()]:  # fmt: skip
                each.close()  # as the end of its process does
        with pytest.raises(RanksError, match=f"rank {lost}: its connection has ended"):
            answer.result(SECONDS)
    assert other.await_first_failure() == lost
    other.fail(RuntimeError("connection closed by peer"))
    assert asking.first_failure == other.first_failure == lost


def test_nobody_waits_for_answers_behind_a_failure(peers: list[Any]) -> None:
    """Whoever asks again, after it was told: of others, of a rank itself, and of rank 0's end."""
    peers[2].fail(ConfigError("block_size=3"))
    for _ in range(2):
        for each in peers:
            with pytest.raises(ConfigError, match="rank 2: block_size=3"):
                each.largest_of([0.0])


def test_a_rank_that_others_have_given_up_is_told_so(meetings: list[Any]) -> None:
    """It was slow, and asks when they have left."""
    meetings[1].fail("it did not answer", 0)
    with pytest.raises(RanksError, match="rank 0: it did not answer"):
        meetings[0].largest_of([0.0])


class Seated:
    """Of an engine of one rank; its meetings were made before."""

    setup = ()
    ranks = 1

    def __init__(self, rank: int, meeting: Any, everyone: Any) -> None:
        self.rank, self.size = rank, SIZE
        self.meeting, self.everyone_of = lambda: meeting, lambda rank: everyone


@pytest.mark.parametrize("silent", [0, 2])
@pytest.mark.parametrize("remote", [False, True], ids=["memory", "connections"])
def test_who_does_not_answer_is_who_failed(
    monkeypatch: pytest.MonkeyPatch, silent: int, remote: bool
) -> None:
    """And not who notices it, nor rank 0 where that waits for another one itself."""
    if silent == 0:
        monkeypatch.setattr(star, "GRACE_SECONDS", 0.0)
    if remote:
        meetings, everyone = through_connections(), through_connections()
    else:
        meetings, memory = through_memory(), create(Board.nbytes(SIZE, 0))
        everyone = [Board(memory, rank, SIZE, 0) for rank in range(SIZE)]
        os.close(memory)
    for each in meetings:
        each.timeout = 0.1
    engines = [
        Lockstep(Seated(rank, meetings[rank], everyone[rank]), CpuPlatform())  # type: ignore[arg-type]
        for rank in range(SIZE) if rank != silent
    ]  # fmt: skip

    all_ask = threading.Barrier(len(engines))
    for each in meetings:
        each._wake_others = all_ask.wait

    def meet(number: int, engine: Lockstep) -> str:
        if remote and engine.rank == 0:
            while not meetings[0].is_asked:  # else it might wait for the other one in vain, too
                time.sleep(1e-3)
        with pytest.raises(RanksError) as caught:
            engine.meet(Wish.STEP)
        return str(caught.value)

    told = by_all(engines, meet)
    assert told == [f"engine {silent} did not answer within 0 s"] * (SIZE - 1)
    for engine in engines:
        assert engine.everyone.await_first_failure() == silent
    for each in (*meetings, *everyone):
        each.end()

"""The memory that ranks share, with threads for processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from reprise.distributed import require_same
from reprise.distributed.board import Board, create
from reprise.distributed.ring import Reader, Writer
from reprise.errors import ConfigError, RanksError

RING = 256


@pytest.fixture
def boards() -> Iterator[list[Board]]:
    memory = create(Board.nbytes(3, RING))
    found = [Board(memory, rank, 3, RING) for rank in range(3)]
    os.close(memory)
    for each in found:
        each.timeout = 20.0
    yield found
    for each in found:
        each.close()


def test_all_get_the_same_answers(boards: list[Board]) -> None:
    def ask(board: Board) -> list[float]:
        found = [board.largest(float((board.rank * 7 + n) % 5)) for n in range(300)]
        return [*found, board.all(True), board.all(board.rank != 1)]

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, boards))
    expected = [max(float((rank * 7 + n) % 5) for rank in range(3)) for n in range(300)]
    assert answers == [[*expected, True, False]] * 3


def test_a_rank_that_failed_is_not_waited_for(boards: list[Board]) -> None:
    boards[2].fail(ConfigError("block_size=3"))
    for each in boards[:2]:
        with pytest.raises(ConfigError, match="rank 2: block_size=3"):
            each.all(True)


def test_a_rank_that_was_seen_to_end_comes_before_those_that_miss_it(boards: list[Board]) -> None:
    """Whoever waits for it fails sooner than it is seen that it is gone."""
    assert boards[0].first_failure is None
    boards[2].fail(RuntimeError("connection closed by peer"))
    boards[0].fail(RuntimeError("too late"))
    assert boards[1].first_failure == 2
    boards[0].fail(RanksError("was ended by SIGKILL"), seen=1)
    assert [each.first_failure for each in boards] == [1, 1, 1]
    assert "SIGKILL" in str(boards[2].failure(1))


def test_an_error_that_cannot_be_sent_is_described(boards: list[Board]) -> None:
    boards[1].fail(RuntimeError(threading.Lock()))
    with pytest.raises(RanksError, match="rank 1: RuntimeError"):
        boards[0].all(True)


def test_a_long_error_is_cut(boards: list[Board]) -> None:
    boards[1].fail(ConfigError("x" * 100_000))
    with pytest.raises(RanksError, match="rank 1: xxx"):
        boards[0].all(True)


def test_a_rank_that_does_not_answer_is_named(boards: list[Board]) -> None:
    """On all: by who waited in vain, by who asks later, and by itself; and not who noticed it."""
    told = "^rank 1 did not answer within 0 s; the group ends$"
    boards[0].timeout = 0.05
    with pytest.raises(RanksError, match=told):
        boards[0].all(True)
    for each in boards:
        with pytest.raises(RanksError, match=told):
            each.check()
    boards[0].fail(RuntimeError("connection closed by peer"))
    assert [each.first_failure for each in boards] == [1, 1, 1]


def test_two_that_see_a_rank_end_leave_one_text(boards: list[Board]) -> None:
    """Both may be in the midst of it: one's words and the other one's length."""
    boards[0].fail("was ended by SIGKILL", seen=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "_of", lambda *_: 0)  # as it looked when the other one began
        patch.setattr(Board, "_set", lambda *_: None)
        boards[2].fail("was ended by SIGKILL, as its process says", seen=1)
    assert boards[1].failure(1) == "was ended by SIGKILL, as its process says"


def test_a_rank_that_left_a_pass_alone_ends_the_group(boards: list[Board]) -> None:
    """Others have begun a collective that it never enters: nobody waits for the other's answer."""
    for each, calls in zip(boards, (7, 6, 7), strict=True):
        each.note_calls(calls)
    boards[1].fell_out("graph decode[1]: no memory")
    told = "graph decode.1.: no memory; on this rank alone: rank 0 waits for it in a collective"
    with pytest.raises(RanksError, match=told):
        boards[1].all(False)
    with pytest.raises(RanksError, match=f"rank 1: {told}"):
        boards[0].all(True)
    assert not boards[2].all(True)  # it may have answered before; no further question is
    with pytest.raises(RanksError, match=f"rank 1: {told}"):
        boards[2].check()


def test_ranks_that_left_a_pass_alike_go_on(boards: list[Board]) -> None:
    """All, or those behind the last collective of it: who is behind is waited for by nobody."""
    for left, calls in (((0, 1, 2), (6, 6, 6)), ((1,), (6, 6, 6)), ((1,), (6, 9, 6))):
        for each, count in zip(boards, calls, strict=True):
            each.note_calls(count)
        for rank in left:
            boards[rank].fell_out("host_sync")
        with ThreadPoolExecutor(3) as pool:
            answers = pool.map(lambda each: each.all(each.rank not in left), boards)  # noqa: B023
            assert list(answers) == [False] * 3
    with ThreadPoolExecutor(3) as pool:
        boards[1].note_calls(0)  # nobody has left the next pass
        assert list(pool.map(lambda each: each.all(True), boards)) == [True] * 3


def test_ranks_that_are_not_alike_are_refused(boards: list[Board]) -> None:
    def begin(board: Board) -> str:
        try:
            require_same(board, "torch", 2 if board.rank == 1 else 1)
        except RanksError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        assert all("not alike" in each for each in pool.map(begin, boards))


def test_messages_arrive_in_order_whatever_their_length(boards: list[Board]) -> None:
    """Longer than the ring, as long, and empty; one reader sleeps now and then."""
    messages = [bytes([n % 251]) * size for n, size in enumerate([0, 1, 252, 253, 1000, 7, 0] * 9)]
    pipes = [os.pipe() for _ in range(2)]
    for pair in pipes:
        for end in pair:
            os.set_blocking(end, False)
    writer = Writer(boards[0], [waker for _, waker in pipes])
    pause = threading.Event()

    def read(board: Board) -> list[bytes]:
        reader = Reader(board, pipes[board.rank - 1][0], lambda: None)
        found = []
        for number in range(len(messages)):
            if board.rank == 2 and number % 10 == 9:
                pause.wait(0.02)
            found.append(reader.receive())
        return found

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read, each) for each in boards[1:]]
        for each in messages:
            writer.send(each)
        assert [each.result() for each in reading] == [messages, messages]
    for pair in pipes:
        for end in pair:
            os.close(end)


def test_a_message_that_was_lost_is_missed(
    boards: list[Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reprise.distributed.ring.LOST_SECONDS", 0.1)
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    boards[0].sent += 1
    with pytest.raises(RanksError, match="message 1 of 1 from the leader was lost"):
        Reader(boards[1], woken, lambda: None).receive()
    os.close(woken)
    os.close(waker)

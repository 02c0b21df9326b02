"""Which follower is named when a group is over, by what the leader sees of all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from reprise.distributed.board import Board, create
from reprise.errors import ConfigError, RanksError
from reprise.parallel.followers import SETTLE_SECONDS, WATCH_SECONDS, Looks

SIZE = 4
LIVE: dict[int, str | None] = dict.fromkeys(range(1, SIZE))
KILLED = {**LIVE, 3: "was ended by SIGKILL"}
CLOSED = "RuntimeError: connection closed by peer"
PATIENCE = 1.0


@pytest.fixture
def boards() -> Iterator[list[Board]]:
    memory = create(Board.nbytes(SIZE, 0))
    found = [Board(memory, rank, SIZE, 0) for rank in range(SIZE)]
    os.close(memory)
    yield found
    for each in found:
        each.close()


@pytest.mark.parametrize("seen_after", [0, 2])
def test_whose_process_is_gone_comes_before_those_that_miss_it(
    boards: list[Board], seen_after: int
) -> None:
    """Though they say so before it is seen."""
    looks = Looks(SIZE, PATIENCE)
    for rank in (1, 2):
        boards[rank].fail(RuntimeError("connection closed by peer"))
    for _ in range(seen_after):
        assert looks.look(boards[0], LIVE) is None
    assert looks.look(boards[0], KILLED) == (3, "was ended by SIGKILL")


def test_what_ranks_say_is_believed_in_the_end(boards: list[Board]) -> None:
    """A typed error at once; another one when no process is seen to be gone: the first one's."""
    looks = Looks(SIZE, PATIENCE)
    boards[2].fail(RuntimeError("connection closed by peer"))
    boards[1].fail(RuntimeError("connection closed by peer"))
    found = [looks.look(boards[0], LIVE) for _ in range(int(SETTLE_SECONDS / WATCH_SECONDS) + 2)]
    assert next(each for each in found if each) == (2, CLOSED)
    assert found[0] is None
    boards[3].fail(ConfigError("block_size=3"), seen=3)
    assert Looks(SIZE, PATIENCE).look(boards[0], LIVE) == (3, "block_size=3")


def test_who_does_not_answer_is_lost_and_not_who_says_so(boards: list[Board]) -> None:
    all_ask = Barrier(SIZE - 1)

    def asked() -> None:
        all_ask.wait()

    def ask(board: Board) -> None:
        board.timeout = 0.05
        with pytest.raises(RanksError) as caught:
            board.largest_of([0.0], asked)
        board.fail(caught.value)  # as the process of each does

    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(ask, [boards[0], boards[1], boards[3]]))
    told = "rank 2 did not answer within 0 s; the group ends"
    assert Looks(SIZE, PATIENCE).look(boards[0], LIVE) == (2, told)


@pytest.mark.parametrize("hangs", range(1, SIZE))
def test_of_those_that_do_nothing_the_one_that_others_wait_for_is_named(
    boards: list[Board], hangs: int
) -> None:
    """They have begun a collective that it has not."""
    looks = Looks(SIZE, PATIENCE)
    boards[0].sent = 5
    for rank, each in enumerate(boards):
        each.note_done(4)
        each.note_calls(70 - (rank == hangs))
    found = [looks.look(boards[0], LIVE) for _ in range(int(PATIENCE / WATCH_SECONDS) + 3)]
    assert {each for each in found if each} == {(hangs, "it has done nothing for 1 s")}


def test_a_process_that_does_not_run_is_named_and_not_those_that_wait(boards: list[Board]) -> None:
    looks, named = Looks(SIZE, 1e9), None
    boards[0].sent = 5
    boards[2].beat()
    while named is None:
        boards[1].beat()
        boards[3].beat()
        named = looks.look(boards[0], LIVE)
    assert named == (2, "its process has not run for 30 s")

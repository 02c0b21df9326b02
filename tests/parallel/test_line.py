"""Connections between hosts: who may speak on them, and what leader and followers say. Hosts are
threads here."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from reprise.distributed import Group, Host, require_same
from reprise.distributed.line import FollowersLine, LeadersLine
from reprise.errors import ConfigError, RanksError, RepriseError
from reprise.parallel.followers import Looks
from reprise.processes.sealed import Listener, Seal, Sealed, connect, new_secret
from reprise.processes.wire import framed

ADDRESS = "127.0.0.1"
SECONDS = 60.0
"""For what takes milliseconds."""


@contextlib.contextmanager
def listening(secret: bytes) -> Iterator[Listener]:
    found = Listener(ADDRESS, secret)
    yield found
    found.close()


def pair(secret: bytes) -> tuple[Sealed, Sealed]:
    """Both ends of a connection."""
    with listening(secret) as listener:
        ours = connect(listener.place, "rank 1", secret, SECONDS)
        return ours, listener.take("rank 1", SECONDS)


@pytest.mark.parametrize("length", [0, 1, 1 << 16, 5_000_000])
def test_what_is_sent_arrives(length: int) -> None:
    bodies = [bytes([n]) * length for n in range(3)]
    for one, other in (ends := pair(new_secret())), ends[::-1]:
        sending = threading.Thread(target=lambda to=one: [to.send(each) for each in bodies])
        sending.start()
        assert [other.receive() for _ in bodies] == bodies
        sending.join()


def test_who_does_not_know_the_secret_is_not_listened_to() -> None:
    secret = new_secret()
    with listening(secret) as listener:
        with pytest.raises(RepriseError, match="does not know the secret"):
            connect(listener.place, "rank 1", new_secret(), SECONDS)
        with pytest.raises(TimeoutError, match="rank 1 has not connected"):
            listener.take("rank 1", 0.0)
        connect(listener.place, "rank 1", secret, SECONDS)  # who knows it is
        listener.take("rank 1", SECONDS)


def test_who_listens_without_the_secret_is_told_nothing() -> None:
    """Somebody at the leader's address: no proof that could be used elsewhere, and no role."""
    heard = bytearray()

    def listen(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            heard.extend(connection.recv(41, socket.MSG_WAITALL))
            connection.sendall(b"\0" * 48)
            while more := connection.recv(4096):
                heard.extend(more)

    with socket.create_server((ADDRESS, 0)) as server:
        listener = threading.Thread(target=listen, args=(server,))
        listener.start()
        with pytest.raises(RepriseError, match="the other side does not know the secret"):
            connect(server.getsockname(), "rank 1", new_secret(), SECONDS)
        listener.join(SECONDS)
    assert len(heard) == 41


class Bomb:
    def __reduce__(self) -> Any:
        return exploded.append, (1,)


exploded: list[int] = []


@pytest.mark.parametrize("proof", [b"", b"\0" * 16])
def test_a_strangers_pickle_is_never_read(proof: bytes) -> None:
    """Whatever a stranger sends instead of a proof, and behind it: the connection ends."""
    with listening(new_secret()) as listener:
        stranger = socket.create_connection(listener.place)
        stranger.settimeout(SECONDS)
        stranger.sendall(b"reprise-1" + b"\0" * 32 + proof + framed(pickle.dumps(Bomb())))
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
        stranger.close()
        with pytest.raises(TimeoutError):
            listener.take("rank 1", 0.0)
    assert not exploded


def forged(seal: Seal, body: bytes) -> bytes:
    return b"\0" * 16 + body


def changed(seal: Seal, body: bytes) -> bytes:
    return seal.close(body)[:-1] + b"!"


def later(seal: Seal, body: bytes) -> bytes:
    """One before it is missing."""
    seal.close(body)
    return seal.close(body)


@pytest.mark.parametrize("frame", [forged, changed, later])
def test_a_frame_that_was_not_sent_next_is_not_read(frame: Any) -> None:
    """Somebody on the way writes into a connection: what is pickled there is not read either."""
    ours, theirs = pair(new_secret())
    line = LeadersLine({1: theirs}, SECONDS)
    ours.connection.sendall(framed(frame(ours.sending, b"\4" + pickle.dumps(Bomb()))))
    with pytest.raises(RanksError, match="rank 1: RepriseError: frame 2 of a connection"):
        line.all(True)
    assert not exploded


def test_a_frame_that_is_repeated_is_not_read() -> None:
    ours, theirs = pair(new_secret())
    frame = framed(ours.sending.close(b"once"))
    ours.connection.sendall(frame + frame)
    assert theirs.receive() == b"once"
    with pytest.raises(RepriseError, match="frame 3 of a connection between hosts was forged"):
        theirs.receive()


def test_frames_of_the_other_direction_are_not_read() -> None:
    ours, theirs = pair(new_secret())
    ours.connection.sendall(framed(theirs.sending.close(b"to us")))
    with pytest.raises(RepriseError, match="forged"):
        theirs.receive()


# ---- leader and followers ----------------------------------------------------------------


class Lines:
    def __init__(self, size: int) -> None:
        secret = new_secret()
        with listening(secret) as listener:
            followers = {
                rank: connect(listener.place, f"rank {rank}", secret, SECONDS)
                for rank in range(1, size)
            }
            leaders = {rank: listener.take(f"rank {rank}", SECONDS) for rank in followers}
        self.leader = LeadersLine(leaders, SECONDS)
        self.followers = [FollowersLine(each, rank, size) for rank, each in followers.items()]
        self.all = [self.leader, *self.followers]


@pytest.fixture
def lines() -> Iterator[Lines]:
    found = Lines(3)
    yield found
    found.leader.end()


def test_all_get_the_same_answers(lines: Lines) -> None:
    def ask(line: Any) -> list[float]:
        found = [line.largest(float((line.rank * 7 + n) % 5)) for n in range(100)]
        return [*found, line.all(True), line.all(line.rank != 1)]

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, lines.all))
    expected = [max(float((rank * 7 + n) % 5) for rank in range(3)) for n in range(100)]
    assert answers == [[*expected, True, False]] * 3


def test_messages_arrive_in_order_whatever_their_length(lines: Lines) -> None:
    """Also those that come before the answer to a question that was asked earlier."""
    messages = [bytes([n % 251]) * size for n, size in enumerate([0, 1, 70_000, 7, 1 << 20] * 9)]

    def read(line: FollowersLine) -> list[bytes]:
        assert line.all(True)
        return [line.receive() for _ in messages]

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read, each) for each in lines.followers]
        for each in messages:
            lines.leader.send(each)
        assert lines.leader.all(True)
        assert [each.result() for each in reading] == [messages, messages]
    assert lines.leader.sent == len(messages)


def test_the_leader_sees_how_far_each_is(lines: Lines) -> None:
    first = lines.followers[0]
    lines.leader.send(b"one")
    lines.leader.send(b"two")
    first.receive()
    first.receive()
    first.note_done(1)
    first.beat()
    threading.Thread(target=first.all, args=(True,)).start()  # what it said before has come then
    threading.Thread(target=lines.followers[1].all, args=(True,)).start()
    assert lines.leader.all(True)
    assert (lines.leader.received(1), lines.leader.done(1), lines.leader.beats(1)) == (2, 1, 1)
    assert (lines.leader.received(2), lines.leader.done(2), lines.leader.beats(2)) == (0, 0, 0)


def test_a_rank_that_failed_is_not_waited_for(lines: Lines) -> None:
    lines.followers[1].fail(ConfigError("block_size=3"))
    with pytest.raises(ConfigError, match="rank 2: block_size=3"):
        lines.leader.all(True)


def test_a_rank_that_is_gone_is_not_waited_for(lines: Lines) -> None:
    lines.followers[0].close()
    with pytest.raises(RanksError, match="rank 1: its connection has ended"):
        lines.leader.all(True)


def test_a_rank_that_does_not_answer_is_named(lines: Lines) -> None:
    lines.leader.timeout = 0.1
    with pytest.raises(RanksError, match="rank 1 did not answer within"):
        lines.leader.all(True)
    lost = Looks(3, SECONDS).look(lines.leader, {1: None, 2: None})
    assert lost == (1, "rank 1 did not answer within 0 s; the group ends")


def test_followers_end_with_the_leader(lines: Lines) -> None:
    """Those that wait for a message, those that wait for an answer, and those that do neither."""
    ended = [threading.Event() for _ in lines.followers]
    for line, event in zip(lines.followers, ended, strict=True):
        line.on_end = event.set  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(lines.followers[0].receive)
        asking = pool.submit(lines.followers[1].all, True)
        lines.leader.end()
        for each in (waiting, asking):
            with pytest.raises(RanksError):
                each.result(SECONDS)
    assert all(each.wait(SECONDS) for each in ended)


def test_ranks_that_are_not_alike_are_refused(lines: Lines) -> None:
    def begin(line: Any) -> str:
        try:
            require_same(line, "torch", 2 if line.rank == 1 else 1)
        except RanksError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        assert all("not alike" in each for each in pool.map(begin, lines.all))


def test_a_group_knows_where_its_ranks_are() -> None:
    one, two = Host("a", "10.0.0.1"), Host("b", "10.0.0.2")
    here = Group("here", 1, 2)
    assert here.on_one_host
    assert (here.beside, here.host.address) == (2, "127.0.0.1")
    spread = Group("spread", 1, 3, (one, two, two))
    assert not spread.on_one_host
    assert (spread.beside, spread.host, spread.leader) == (2, two, one)
    assert Group("packed", 0, 2, (two, two)).on_one_host

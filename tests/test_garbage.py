"""The collector of cyclic garbage stays away from blocks that ask for it, and comes back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
from forks import MARKS, is_true_in_a_fork
from helpers import make_llm

from reprise import garbage
from reprise.engine import start
from reprise.errors import ModelError
from reprise.garbage import uncollected


def test_nothing_is_collected_in_the_block_and_all_is_after_the_last_one() -> None:
    assert gc.isenabled()
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_brings_it_back() -> None:
    with pytest.raises(ValueError, match="broken"), uncollected():
        raise ValueError("broken")
    assert gc.isenabled()


def test_who_had_it_switched_off_finds_it_so() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_block_of_one_thread_does_not_end_that_of_another() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            entered.set()
            left.wait(20)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        assert entered.wait(20)
    assert not gc.isenabled()
    left.set()
    thread.join(20)
    assert gc.isenabled()


needs_fork, may_fork = MARKS


@needs_fork
@may_fork
def test_what_somebody_has_frozen_stays_so() -> None:
    """In a fork: who thaws one object thaws all, those of the other tests too. How many are frozen
    says nothing, since threads let go of some."""
    mine: list[object] = []

    def is_frozen() -> bool:
        return all(each is not mine for each in gc.get_objects())

    def stays() -> bool:
        gc.freeze()
        before = is_frozen()
        with uncollected():
            pass
        return before and is_frozen()

    assert not is_frozen()
    assert is_true_in_a_fork(stays)


def test_what_somebody_has_frozen_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count a million objects takes as long as to look through them."""
    counted: list[int] = []

    def count() -> int:
        counted.append(1_000_000)
        return counted[-1]

    monkeypatch.setattr(garbage, "_others_freeze", False)
    monkeypatch.setattr(gc, "get_freeze_count", count)
    for _ in range(3):
        with uncollected():
            pass
    assert len(counted) == 1


@needs_fork
@may_fork
def test_a_fork_has_no_part_in_the_blocks_of_its_parents_threads() -> None:
    """Nobody would end them there. Its own one goes on."""
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            entered.set()
            left.wait(20)

    def within() -> bool:
        with uncollected():
            inside = not gc.isenabled()
        return inside and gc.isenabled()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert entered.wait(20)
        assert is_true_in_a_fork(lambda: gc.isenabled() and within())
        with uncollected():
            assert is_true_in_a_fork(lambda: not gc.isenabled() and not within())
    finally:
        left.set()
        thread.join(20)
    assert gc.isenabled()


@needs_fork
@may_fork
def test_a_fork_of_who_has_it_switched_off_has_it_so() -> None:
    with uncollected():
        pass
    gc.disable()
    try:
        assert is_true_in_a_fork(lambda: not gc.isenabled())
    finally:
        gc.enable()


def test_an_engine_takes_no_memory_before_that_of_forgotten_ones_is_back(
    tiny, device, platform, monkeypatch
):
    """Theirs is kept by cycles, and weights and cache would have what is left beside."""

    class Forgotten:
        pass

    forgotten = Forgotten()
    forgotten.itself, seen = forgotten, weakref.ref(forgotten)
    del forgotten

    def runner(*args):
        raise ModelError("gone" if seen() is None else "still there")

    monkeypatch.setattr(type(platform), "counts_memory", True)
    monkeypatch.setattr(type(platform), "memory_allocated", lambda self: 4)
    monkeypatch.setattr(start, "ModelRunner", runner)
    with uncollected(), pytest.raises(ModelError, match="gone"):
        make_llm(tiny("qwen3"), device)


SERVES = """
import gc, os, socket
from reprise.engine.process import serve
from reprise.processes.control import Control

class Service:
    def run(self):
        os.write(1, f"{gc.get_freeze_count()} {gc.get_threshold()[0]}".encode())

ours, theirs = socket.socketpair()
serve(Control(ours), Service)
"""


def test_an_engine_s_process_never_looks_through_its_start_again() -> None:
    """That takes a tenth of a second, at any time."""
    run = [sys.executable, "-c", SERVES]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    frozen, young = map(int, told.split())
    assert frozen > 100_000  # torch's alone are more
    assert young == garbage.YOUNG_OBJECTS


def test_a_first_engine_looks_for_no_other(tiny, device, platform, monkeypatch):
    """Nothing is on the device: a look through all objects would hold up the threads beside."""
    looked = []

    def runner(*args):
        raise ModelError("no further")

    monkeypatch.setattr(type(platform), "counts_memory", True)
    monkeypatch.setattr(type(platform), "memory_allocated", lambda self: 0)
    monkeypatch.setattr(start, "ModelRunner", runner)
    monkeypatch.setattr(gc, "collect", lambda *args: looked.append(args) or 0)
    with pytest.raises(ModelError, match="no further"):
        make_llm(tiny("qwen3"), device)
    assert not looked

"""The collector of cyclic garbage stays away from blocks that ask for it, and comes back."""

from __future__ import annotations

import gc
import threading

import pytest

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

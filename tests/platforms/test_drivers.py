"""What is begun before torch is imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from queue import SimpleQueue

import pytest

from reprise.platforms import drivers

PROGRAM = """
import sys
from reprise import early, platforms

real = early.begin

def begin(options):
    real(options)
    print("torch" in sys.modules, *sorted(options))

early.begin = begin
from reprise.cli import main
main()
"""


def test_a_command_begins_what_needs_no_torch_before_it_is_imported() -> None:
    options = ("--device", "cpu", "--dtype", "float32", "--num-blocks", "160")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "generate", "47 + 38 =", "-n", "2", "-q", *options],
        capture_output=True,
        text=True,
    )
    begun, text = done.stdout.splitlines()
    assert begun == "False device dtype num_blocks"
    assert text.strip()


@pytest.mark.parametrize(
    ("device", "woken"),
    [
        ("auto", {("one", 0), ("other", 0)}),
        ("one", {("one", 0)}),
        ("other:3", {("other", 3)}),
        ("cpu", set()),
        ("one:first", set()),  # to be refused by who reads it
    ],
)
def test_drivers_of_devices_that_may_be_meant_are_woken(monkeypatch, device, woken) -> None:
    calls: SimpleQueue[tuple[str, int]] = SimpleQueue()

    def driver(name: str):
        return lambda index: lambda: calls.put((name, index))

    monkeypatch.setattr(drivers, "_DRIVERS", {each: driver(each) for each in ("one", "other")})
    drivers.wake(device)
    assert {calls.get(timeout=60) for _ in woken} == woken
    assert calls.empty()


def test_what_a_device_alone_needs_is_done_where_its_driver_is(monkeypatch) -> None:
    done: SimpleQueue[str] = SimpleQueue()

    def absent(index: int) -> None:
        done.put("absent")

    monkeypatch.setattr(drivers, "_DRIVERS", {"x": absent})
    drivers.wake(beside=lambda: done.put("beside"))
    monkeypatch.setattr(drivers, "_DRIVERS", {"x": lambda index: lambda: None})
    drivers.wake(beside=lambda: done.put("beside"))
    assert sorted(done.get(timeout=60) for _ in range(2)) == ["absent", "beside"]
    assert done.empty()


def test_a_machine_without_the_driver_starts_as_others(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(drivers.ctypes, "CDLL", missing)
    assert drivers._cuda(0) is None


def test_it_is_done_while_the_driver_starts(monkeypatch) -> None:
    """Neither waits for the other: a driver takes as long as the compiler's fingerprint."""
    begun: SimpleQueue[str] = SimpleQueue()
    may_end = threading.Event()
    monkeypatch.setattr(drivers, "_DRIVERS", {"x": lambda index: lambda: may_end.wait(60)})
    drivers.wake(beside=lambda: begun.put("beside"))
    try:
        assert begun.get(timeout=30) == "beside"
    finally:
        may_end.set()

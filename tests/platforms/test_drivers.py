"""What is begun before torch is imported."""

from __future__ import annotations

import subprocess
import sys
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

    def start(name: str):
        def begin(index: int) -> bool:
            calls.put((name, index))
            return True

        return begin

    monkeypatch.setattr(drivers, "_STARTS", {each: start(each) for each in ("one", "other")})
    drivers.wake(device)
    assert {calls.get(timeout=60) for _ in woken} == woken
    assert calls.empty()


def test_what_a_device_alone_needs_is_done_where_there_is_one(monkeypatch) -> None:
    done: SimpleQueue[str] = SimpleQueue()

    def absent(index: int) -> bool:
        done.put("absent")
        return False

    monkeypatch.setattr(drivers, "_STARTS", {"x": absent})
    drivers.wake(then=lambda: done.put("then"))
    monkeypatch.setattr(drivers, "_STARTS", {"x": lambda index: True})
    drivers.wake(then=lambda: done.put("then"))
    assert sorted(done.get(timeout=60) for _ in range(2)) == ["absent", "then"]
    assert done.empty()


def test_a_machine_without_the_driver_starts_as_others(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(drivers.ctypes, "CDLL", missing)
    assert drivers._wake_cuda(0) is False

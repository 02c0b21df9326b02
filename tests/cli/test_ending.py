"""Long commands that are told to end: by a signal, by a time limit, and where neither helps."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from warm import end_with_parent

PROGRAM = """
import threading, time, types
from reprise.cli import ending

ending.GRACE_SECONDS = {grace}
begun, select = threading.Event(), ending.select.select

def behind_the_beginning(*what):
    begun.wait()
    return select(*what)

ending.select = types.SimpleNamespace(select=behind_the_beginning)
try:
    with ending.Ending(lambda: print("last words"), {limit}) as end:
        while True:
            try:
                begun.set()
                print("runs", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                if not {deaf}:
                    raise
except KeyboardInterrupt:
    print("ended by", end.reason)
    raise SystemExit(end.status)
"""


def run(number=None, *, limit=None, deaf=False):
    """What the program prints behind the line that says that it runs, and its status."""
    text = PROGRAM.format(limit=limit, deaf=deaf, grace=0.2 if deaf else 600)
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )
    with process:
        if number is not None:
            assert process.stdout.readline() == "runs\n"
            process.send_signal(number)
        printed = [line for line in process.stdout.read().splitlines() if line != "runs"]
    return printed, process.returncode


@pytest.mark.parametrize(
    ("number", "limit", "told", "status"),
    [
        (signal.SIGINT, None, "SIGINT", 130),
        (signal.SIGTERM, 600, "SIGTERM", 143),
        (None, 0.1, "the time limit of 0.1 s", 124),
    ],
    ids=["Ctrl-C", "SIGTERM", "limit"],
)
def test_the_block_is_left(number, limit, told, status):
    assert run(number, limit=limit) == ([f"ended by {told}"], status)


@pytest.mark.parametrize(
    ("number", "limit", "status"),
    [(signal.SIGINT, None, 130), (signal.SIGTERM, None, 143), (None, 0.1, 124)],
    ids=["Ctrl-C", "SIGTERM", "limit"],
)
def test_what_never_returns_ends_with_the_last_words(number, limit, status):
    """As a device that hangs, whose driver's call lets no handler run."""
    assert run(number, limit=limit, deaf=True) == (["last words"], status)

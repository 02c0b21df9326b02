"""A child that is forked from a warm process is what the caller would have started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

from reprise.cli.logs import LIBRARY_SETTINGS

pytestmark = pytest.mark.skipif(not warm.can_be(), reason="the system hands no orphans on")


@pytest.fixture(scope="module", autouse=True)
def nursery() -> Iterator[None]:
    with warm.processes():
        yield


@pytest.fixture
def variables() -> dict[str, str]:
    """Of an environment in which the program is found."""
    return {
        **warm.Popen.usual,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), warm.ROOT]),
    }


def told(cold: bool, *options: str, **how: Any) -> tuple[dict[str, Any], bool]:
    """What the program says, and whether it was forked."""
    read, write = os.pipe()
    warm.Popen.cold = cold
    # As an engine's parent has it: a signal for all processes of a terminal waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        program = subprocess.Popen(
            [sys.executable, *options], pass_fds=[read], text=True, **{**streams, **how}
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        warm.Popen.cold = False
        os.close(read)
        os.close(write)
    output, errors = program.communicate(program.stdin and "what it reads\n", timeout=100)
    assert (program.returncode, errors) == (7, "")
    found = json.loads(output)
    assert found["facts"]["parent"] == os.getpid()
    return found["facts"], found["warm"]


FILE = str(Path(__file__).with_name("told.py"))


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is served as a file, too."""
    monkeypatch.setitem(warm.PROGRAMS, FILE, True)


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize(
    "options", [["-m", "told"], ["-P", "-m", "told"], [FILE], ["-P", FILE]], ids=" ".join
)
def test_it_is_as_if_it_were_started(
    variables: dict[str, str], tmp_path: Path, both: None, options: list[str], session: bool
) -> None:
    how: dict[str, Any] = {
        "cwd": tmp_path, "env": {**variables, "TMPDIR": "x"}, "start_new_session": session,
        "preexec_fn": warm.end_with_parent if session else None,
    }  # fmt: skip
    expected, forked = told(True, *options, "7", **how)
    assert not forked
    found, forked = told(False, *options, "7", **how)
    assert forked
    assert found == expected
    assert found["ends_with_parent"] == session
    assert found["blocked"] == [signal.SIGTERM]
    assert found["input"] == "what it reads\n"
    assert found["leads_a_session"] == session


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_are_as_python_opens_them(variables: dict[str, str], unbuffered: str) -> None:
    """In a pipe they were nothing that a nursery could have had."""
    with pytest.MonkeyPatch.context() as patch:
        usual = {**warm.Popen.usual, "PYTHONUNBUFFERED": unbuffered}
        patch.setattr(warm.Popen, "nursery", warm.Nursery.started(usual, imports=()))
        how = {"env": {**variables, "PYTHONUNBUFFERED": unbuffered}}
        expected, _ = told(True, "-m", "told", "7", **how)
        found, forked = told(False, "-m", "told", "7", **how)
        assert warm.Popen.nursery is not None
        warm.Popen.nursery.close()
    assert forked
    assert found["streams"] == expected["streams"]


@pytest.mark.parametrize("number", [0, 2])
def test_streams_may_be_closed(variables: dict[str, str], number: int) -> None:
    """The third kind, output, has none to tell it: tests of commands close that."""
    how = {"env": variables, "preexec_fn": warm.WITHOUT[number]}
    expected, _ = told(True, "-m", "told", "7", **how)
    found, forked = told(False, "-m", "told", "7", **how)
    assert forked
    assert found == expected
    assert found["streams"][number] is None


def test_a_terminal_may_be_its_own(variables: dict[str, str]) -> None:
    ours, theirs = os.openpty()
    try:
        how = {"env": variables, "start_new_session": True, "stdin": theirs}
        for prepare in (warm.lead_terminal, None):
            os.write(ours, b"what it reads\n\x04")
            expected, _ = told(True, "-m", "told", "7", preexec_fn=prepare, **how)
            os.write(ours, b"what it reads\n\x04")
            found, forked = told(False, "-m", "told", "7", preexec_fn=prepare, **how)
            assert forked
            assert found == expected
            assert found["leads_a_terminal"] == (prepare is not None)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("session", [False, True])
def test_its_children_are_forked_too(variables: dict[str, str], session: bool) -> None:
    how: dict[str, Any] = {"env": variables, "start_new_session": session}
    expected, _ = told(True, "-m", "told", "7", "child", **how)
    found, _ = told(False, "-m", "told", "7", "child", **how)
    assert not expected["child"].pop("warm")
    assert found["child"].pop("warm")
    assert expected["child"]["facts"]["parent"] == 0
    assert found == expected


def test_what_commands_set_in_this_process_makes_no_other_program(
    variables: dict[str, str],
) -> None:
    """They leave it: tests behind them would all have started what is forked."""
    left = {**LIBRARY_SETTINGS, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "KINETO_LOG_LEVEL": "99"}
    assert told(False, "-m", "told", "7", env={**variables, **left})[1]


def test_others_are_started(variables: dict[str, str]) -> None:
    """A variable may make what a program imports other; a program may be another one, or be
    preceded by something."""
    assert not told(False, "-m", "told", "7", env={**variables, "OMP_NUM_THREADS": "3"})[1]
    assert not told(False, "-m", "told", "7", env=variables, preexec_fn=lambda: None)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "PROGRAMS", {})
        assert not told(False, "-m", "told", "7", env=variables)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_its_end_is_told(variables: dict[str, str], number: int) -> None:
    command = [sys.executable, "-m", "told", "7"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=variables) as program:
        assert program.poll() is None
        os.kill(program.pid, signal.SIGSTOP)
        found = os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
        assert found is not None
        os.kill(program.pid, signal.SIGCONT)
        program.send_signal(number)
        assert program.wait(60) == -number


def test_a_signal_that_comes_at_once_is_heeded(variables: dict[str, str]) -> None:
    """Before the program has begun."""
    command = [sys.executable, "-m", "told", "7"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=variables) as program:
        program.terminate()
        assert program.wait(60) == -signal.SIGTERM


@pytest.mark.cold
def test_a_test_that_is_marked_starts_what_it_starts() -> None:
    assert warm.Popen.cold

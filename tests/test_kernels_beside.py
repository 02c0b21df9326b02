"""The process that compiles kernels: how it ends, and what of it others notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reprise import kernels_beside
from reprise.kernels_beside import Beside, Ended, Job, packed

pytest.importorskip("triton")
KILL = signal.raise_signal, (signal.SIGKILL,)


class Does:
    """Where it is unpickled, it does so."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self._made_by = function, arguments

    def __reduce__(self) -> Any:
        return self._made_by


def job(constants: Any = None, launcher: Any = print) -> bytes:
    return packed(Job(json.dumps, {}, constants or {}, {}, None, {}, launcher, {}))


@pytest.fixture(scope="module")
def beside() -> Iterator[Beside]:
    made = Beside(2)
    yield made
    made.close()
    assert _ends(made.pid)


def _ends(group: int) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(group, os.WNOHANG)
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_what_a_compiler_dies_of_is_told_and_others_go_on(beside: Beside) -> None:
    dies, fails, works = (
        beside.ask(each) for each in (job(Does(*KILL)), job(launcher=json.loads), job())
    )
    with pytest.raises(Ended, match="signal 9"):
        dies.result(60)
    with pytest.raises(Ended, match="TypeError"):
        fails.result(60)
    assert works.result(60) >= 0
    assert beside.ask(job()).result(60) >= 0


def _held(pid: int) -> dict[str, str]:
    found = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[each.name] = os.readlink(each)
    return found


def test_it_holds_nothing_of_its_parent(beside: Beside) -> None:
    assert beside.ready.wait(60)
    until = time.monotonic() + 60
    while True:  # for a moment it has what it imports
        held = _held(beside.pid)
        assert {held.pop(each) for each in "012"} == {"/dev/null"}
        if all(each.startswith(("socket:", "pipe:")) for each in held.values()):
            break
        assert time.monotonic() < until, held
    assert sum(each.startswith("socket:") for each in held.values()) == 1
    assert os.getpgid(beside.pid) == beside.pid, "Ctrl-C is not for it"


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from test_kernels_beside import Does, job
from reprise.kernels_beside import Beside
beside = Beside(2)
beside.ask(job(Does(time.sleep, (600,))))
beside.ask(job()).result(60)
print(beside.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_parent_and_so_do_its_compilers() -> None:
    command = [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parent))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        assert len(list(Path(f"/proc/{group}/task/{group}").glob("children"))) == 1
        os.killpg(group, 0)
        parent.kill()
    assert _ends(group)


def test_a_fork_has_no_such_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_beside, "_beside", object())
    child = os.fork()
    if not child:
        os._exit(0 if kernels_beside.begun() is None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_with_one_processor_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_beside, "usable_cpus", lambda: (1, ""))
    monkeypatch.setattr(kernels_beside, "Beside", lambda most: pytest.fail("it was begun"))
    assert kernels_beside.begin() is None


def test_it_ends_when_the_last_start_that_uses_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    beside = SimpleNamespace(close=lambda: closed.append(1))
    monkeypatch.setattr(kernels_beside, "_beside", beside)
    with kernels_beside.used():
        with contextlib.suppress(KeyboardInterrupt), kernels_beside.used():
            raise KeyboardInterrupt
        assert kernels_beside.begun() is beside
    assert closed == [1]
    assert kernels_beside.begun() is None


@pytest.mark.parametrize(("cpus", "share", "most"), [(16, 1, 12), (16, 4, 3), (2, 8, 1)])
def test_it_leaves_processors_to_others(
    monkeypatch: pytest.MonkeyPatch, cpus: int, share: int, most: int
) -> None:
    monkeypatch.setattr(kernels_beside, "_beside", None)
    monkeypatch.setattr(kernels_beside, "usable_cpus", lambda: (cpus, ""))
    monkeypatch.setattr(kernels_beside, "Beside", lambda most: most)
    assert kernels_beside.begin(share) == most


def test_where_it_does_not_start_that_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(most: int) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(kernels_beside, "usable_cpus", lambda: (4, ""))
    monkeypatch.setattr(kernels_beside, "Beside", fails)
    assert kernels_beside.begin() is None
    assert "kernels are compiled in this process: no more processes" in caplog.text


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Grows with each process that would have been begun, by who shares the processors."""
    found: list[int] = []
    monkeypatch.setattr(kernels_beside, "begin", found.append)
    monkeypatch.setattr(kernels_beside, "_asked_for", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return found


def start(options: dict[str, Any]) -> None:
    kernels_beside.remember(options)
    kernels_beside.begin_unless_kept()


def test_a_start_that_finds_all_kernels_begins_none(began: list[int], tmp_path: Path) -> None:
    options = {"model": "some", "max_num_seqs": 4}
    start(options)
    assert len(began) == 1
    kernels_beside.all_kept()
    start(dict(reversed(options.items())))
    assert len(began) == 1
    start({**options, "max_num_seqs": 8})
    assert len(began) == 2, "other options may need others"
    (note,) = (tmp_path / "kernels").iterdir()
    note.unlink()
    start(options)
    assert len(began) == 3, "the note goes with the kernels"


def test_a_program_s_own_engine_begins_one_unless_its_command_has(began: list[int]) -> None:
    kernels_beside.begin_for({"model": "some"}, 4)
    assert began == [4]
    kernels_beside.begin_for({"model": "some"}, 4)
    start({"model": "some"})
    kernels_beside.begin_for({"model": "other"}, 4)
    assert began == [4, 1], "a command's options decide"


def test_another_version_may_need_others(
    began: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "reprise"
    (package / "ops" / "some").mkdir(parents=True)
    (package / "ops" / "some" / "triton.py").touch()
    monkeypatch.setattr(kernels_beside, "__file__", str(package / "kernels_beside.py"))
    start({})
    kernels_beside.all_kept()
    start({})
    assert len(began) == 1
    os.utime(package / "ops" / "some" / "triton.py", (1, 1))
    start({})
    assert len(began) == 2


def test_where_kernels_are_interpreted_none_is_begun(
    began: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    start({})
    kernels_beside.all_kept()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not began
    start({})
    assert began, "nothing was compiled, and no note says so"

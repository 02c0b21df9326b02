"""Libraries of kernels in C++: compiled once, kept whole, by nobody else's choice."""

from __future__ import annotations

import errno
import logging
import os
import select
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from reprise import LLM, compiling
from reprise.errors import OpError
from reprise.ops import cpp, linear, linear_add, norm_linear, paged_attention
from reprise.ops.implementation import runs_anywhere
from reprise.ops.registry import Op, OpTable
from reprise.platforms.cpu import CpuPlatform

SOURCE = compiling.HOME / "linear/few_rows.cpp"
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def compiler_is_there(platform) -> None:
    reason = cpp.needs_compiler(platform)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def anew(monkeypatch, tmp_path) -> Iterator[Path]:
    """Nothing is compiled yet, and no compiler asked; returns where libraries go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_begun", False)
    monkeypatch.setattr(compiling, "_hangs", None)
    asked = compiling._asked, compiling._compile_others, cpp._missing
    for each in (*asked, cpp._run_launches):
        each.cache_clear()
    yield tmp_path / "reprise" / "cpp"
    for each in asked:
        each.cache_clear()


@pytest.fixture
def quick(anew, monkeypatch) -> Callable[[], list[str]]:
    """A compiler that takes no pains: what it makes is no library. Returns what it was told."""
    folder = anew.parent.parent
    log, script = folder / "log", folder / "quick"
    (compiler,) = compiling.compiler()[0]
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -E "*) exec {compiler} "$@";; esac\n'
        f'echo "$*" >> {log}\nsleep 0.1\nfor last; do :; done\necho code > "$last"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    compiling._asked.cache_clear()
    return lambda: log.read_text().splitlines() if log.exists() else []


def libraries(folder: Path) -> set[Path]:
    return {each for each in folder.iterdir() if each.suffix != ".lock"}


def test_a_source_is_compiled_once(anew, quick, caplog) -> None:
    caplog.set_level(logging.INFO, logger="reprise.compiling")
    first = compiling.compiled(SOURCE, "float")
    assert libraries(anew) == {first}
    assert anew.stat().st_mode & 0o77 == 0
    made = first.stat().st_mtime_ns
    assert compiling.compiled(SOURCE, "float") == first
    assert first.stat().st_mtime_ns == made
    assert caplog.text.count("compiled linear-few_rows-float") == 1


def test_what_is_another_program_is_another_library(anew, monkeypatch) -> None:
    source = anew.parent.parent / "twice.cpp"
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    found = {compiling.compiled(source, each) for each in ("", "float", "bf16")}
    source.write_text('extern "C" int twice(int x) { return x + x; }')
    found.add(compiling.compiled(source, ""))
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-DOTHER"))
    found.add(compiling.compiled(source, ""))
    described = compiling.compiler()
    monkeypatch.setattr(compiling, "compiler", lambda: (described[0], b"another processor"))
    found.add(compiling.compiled(source, ""))
    assert len(found) == 6


@pytest.mark.parametrize(("compiler", "why"), [("false", "fails"), ("/nowhere/g++", "no C\\+\\+")])
def test_without_a_compiler_others_compute(anew, monkeypatch, caplog, compiler, why) -> None:
    """One that fails is as good as none: the next implementation is taken, with the reason."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("shutil.which", lambda name: name if name == "false" else None)
    with pytest.raises(OpError, match=why):
        cpp.Kernel("linear/few_rows.cpp", ())
    assert not list(anew.glob("*"))

    folder = anew.parent.parent
    module = f"kernels_of_{folder.name}"
    text = "from reprise.ops.cpp import Kernel\nkernel = Kernel('linear/few_rows.cpp', ())"
    (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    op = Op("taken", linear.schema, (), False, linear.cases)
    op.implementation("reference", lambda *args: "reference")
    op.implementation("cpp", f"{module}:kernel", requires=runs_anywhere)
    assert [each.name for each in op.candidates(CpuPlatform())] == ["reference"]
    assert "op taken: cpp is skipped, it cannot be imported" in caplog.text


def test_where_one_does_not_compile_torch_computes_it(anew, monkeypatch, caplog) -> None:
    """The compiler is there, and its headers or the disk are not: found in the first step."""
    from reprise.ops.linear import cpp as products

    assert compiling.compiler()
    kernel = cpp.Kernel("linear/few_rows.cpp", ())
    monkeypatch.setattr(products, "_few_rows", kernel)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(compiling, "HOME", anew)
    x, weight = torch.ones(2, 64), torch.arange(512.0).view(8, 64)
    for _ in range(2):
        torch.testing.assert_close(products.linear(x, weight, None), x @ weight.T)
    assert caplog.text.count("linear in C++ is left out for torch.float32: ") == 1


def test_a_compiler_may_have_arguments(anew, monkeypatch) -> None:
    """As in ``CXX="ccache g++"``."""
    log = anew.parent.parent / "log"
    script = anew.parent.parent / "wrapper"
    script.write_text(f'#!/bin/sh\necho "$1 $2" >> {log}\nshift\nexec "$@" -O0\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", f"{script} 'an argument' {' '.join(compiling.compiler()[0])}")
    compiling._asked.cache_clear()
    compiling.compiled(SOURCE, "float")
    assert {each.split()[:2][0] for each in log.read_text().splitlines()} == {"an"}
    monkeypatch.setenv("CXX", "g++ 'unfinished")
    compiling._asked.cache_clear()
    with pytest.raises(OpError, match="is no command"):
        compiling.compiler()


def test_all_sources_are_compiled_when_the_first_is_wanted(anew, quick) -> None:
    """Of the numbers that are wanted, and no others."""
    compiling.library(SOURCE, "float")
    assert len(compiling.sources("float")) == len(libraries(anew)) == len(quick()) >= 4
    assert not any("-DNUMBER=bf16" in each for each in quick())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_compiling_begins_before_the_libraries_are_needed(anew, quick, monkeypatch, dtype) -> None:
    """In a process beside; who needs one meanwhile waits for that, or compiles what nobody has
    begun: each source is compiled once."""
    number = "bf16" if dtype == "bfloat16" else "float"
    beside = compiling.begin("cpu", dtype)
    assert beside is not None
    compiling.library(SOURCE, number)
    assert beside.wait() == 0
    told = [each.split() for each in quick()]
    compiled = [next(word for word in each if word.endswith(".cpp")) for each in told]
    assert sorted(compiled) == sorted(str(each) for each, _ in compiling.sources(number))
    assert compiling.begin("cpu", "float32") is None  # it has begun
    monkeypatch.setattr(compiling, "_begun", False)
    assert compiling.begin("cpu", dtype) is None  # all is there
    assert len(quick()) == len(compiled)


def test_an_engine_begins_with_the_numbers_that_it_computes_with(monkeypatch) -> None:
    begun: list[tuple[str, ...]] = []
    monkeypatch.setattr(compiling, "begin", lambda *given: begun.append(given))
    cpp._missing.cache_clear()
    LLM(device="cpu", dtype="bfloat16", num_blocks=160, enforce_eager=True)
    assert begun == [("cpu", "bfloat16")]


@pytest.mark.parametrize("options", [("elsewhere:1", "auto"), ("auto", "float16")])
def test_nothing_begins_for_what_has_no_kernels_in_c(anew, options) -> None:
    assert compiling.begin(*options) is None
    assert not anew.exists()


def test_what_cannot_be_compiled_is_told_to_who_needs_it(anew, monkeypatch, caplog) -> None:
    """And not to those whose engine turns out to compute elsewhere."""
    monkeypatch.setenv("CXX", "false")
    assert compiling.begin() is None
    assert not caplog.records


BEGIN = """
import sys
from reprise import compiling

assert "torch" not in sys.modules
compiling.begin()
sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_what_has_begun_ends_with_its_process(anew, monkeypatch, killed) -> None:
    """A wrong option is told in a moment, and a system ends what takes too much memory: no compiler
    goes on, and nothing is left half done."""
    folder = anew.parent.parent
    alive, script = folder / "alive", folder / "slow"
    os.mkfifo(alive)
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -E "*) exit 0;; esac\nexec sleep 600 > {alive}'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    program = subprocess.Popen([sys.executable, "-c", BEGIN], stdin=subprocess.PIPE)
    with alive.open("rb", buffering=0) as compilers:  # there is one
        assert len(list(anew.glob("unfinished-*"))) >= 1
        if killed:
            program.kill()
        program.communicate()
        assert program.returncode == (-9 if killed else 0)
        assert select.select([compilers], [], [], 60)[0]
        assert compilers.read() == b""  # there is none
    until = time.monotonic() + 60
    while list(anew.glob("unfinished-*")) and time.monotonic() < until:
        time.sleep(0.01)
    assert not libraries(anew)


@pytest.mark.parametrize("why", ["written by others", "a file"])
def test_what_every_op_lacks_is_said_once(anew, monkeypatch, caplog, why) -> None:
    """There is nowhere to keep libraries: all of them have other implementations."""
    if why == "a file":
        anew.parent.write_text("")
    else:
        anew.mkdir(parents=True)
        anew.chmod(0o777)
    chosen = OpTable(CpuPlatform()).chosen
    assert {chosen[each.name].name for each in (linear, norm_linear, linear_add)} == {"onednn"}
    assert chosen[paged_attention.name].name == "torch"
    (said,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "kernels in C++ are left out" in said.message


@pytest.fixture
def twice(anew) -> Path:
    """A source that is compiled in no time."""
    folder = anew.parent.parent / "op"
    folder.mkdir()
    (folder / "twice.cpp").write_text('extern "C" int twice(int x) { return 2 * x; }')
    return folder / "twice.cpp"


def test_a_source_that_does_not_compile_leaves_nothing(anew, twice) -> None:
    twice.write_text("int wrong(")
    with pytest.raises(OpError, match="fails: "):
        compiling.compiled(twice, "")
    assert not libraries(anew)


def test_what_a_full_disk_has_left_is_compiled_again(twice, caplog) -> None:
    """Loading it would end the process, at every start."""
    library = compiling.compiled(twice, "")
    content = library.read_bytes()
    for left in (content[:8000], b"", content[:4096] + bytes(4096) + content[8192:]):
        caplog.clear()
        library.write_bytes(left)
        assert compiling.compiled(twice, "") == library
        assert compiling.is_whole(library)
        assert library.read_bytes() != left
        assert "is spoiled" in caplog.text


@pytest.mark.parametrize("other", ["anybody", "a group", "another user"])
def test_nobody_else_chooses_what_is_loaded(anew, twice, monkeypatch, other) -> None:
    compiling.compiled(twice, "")
    if other == "another user":
        monkeypatch.setattr("os.geteuid", lambda: anew.stat().st_uid + 1)
    else:
        anew.chmod(0o707 if other == "anybody" else 0o770)
    with pytest.raises(OpError, match="XDG_CACHE_HOME"):
        compiling.compiled(twice, "")


@pytest.mark.parametrize("given", ["", "cache", "./cache"])
def test_a_directory_that_is_nowhere_is_home_s(anew, twice, monkeypatch, given) -> None:
    """Who wrote the folder that a program happens to run in must not choose its code."""
    home = anew.parent.parent
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(twice.parent)
    assert compiling.compiled(twice, "").is_relative_to(home / ".cache")
    assert list(twice.parent.iterdir()) == [twice]


def test_the_process_beside_imports_nothing_of_the_folder(anew, quick, monkeypatch) -> None:
    folder = anew.parent.parent / "folder"
    for name in ("hashlib.py", "reprise/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("import os\nos._exit(7)")
    monkeypatch.chdir(folder)
    beside = compiling.begin()
    until = time.monotonic() + 60
    while beside.returncode is None and time.monotonic() < until:  # it is waited for elsewhere
        time.sleep(0.01)
    assert beside.returncode == 0
    assert len(quick()) >= 4


def test_a_compiler_that_does_not_end_is_given_up(anew, monkeypatch) -> None:
    """Once: whoever needs it next does not wait for it again."""
    script, log = anew.parent.parent / "slow", anew.parent.parent / "log"
    script.write_text(f"#!/bin/sh\necho asked >> {log}\nexec sleep 600")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(compiling, "ASK_SECONDS", 0.5)
    assert compiling.begin() is None
    with pytest.raises(OpError, match="takes more than"):
        compiling.library(SOURCE, "float")
    assert "takes more than" in str(cpp.needs_compiler(CpuPlatform()))
    assert log.read_text() == "asked\n"


def test_a_compiler_that_hangs_is_waited_for_once(anew, monkeypatch) -> None:
    """And not once for each source and each op."""
    script, log = anew.parent.parent / "slow", anew.parent.parent / "log"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -E "*) exit 0;; esac\necho begun >> {log}\nexec sleep 600'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(compiling, "usable_cpus", lambda: (1, ""))
    for _ in range(2):
        with pytest.raises(OpError, match="takes more than 0 s"):
            compiling.library(SOURCE, "float")
    assert log.read_text() == "begun\n"


def test_who_waited_for_one_that_could_not_compile_is_told_why(anew, twice, monkeypatch) -> None:
    """A compiler that takes its time to fail would cost as much again."""
    waits, calls = threading.Event(), []

    def fails(command: Sequence[str], seconds: float) -> bytes:
        calls.append(command)
        assert waits.wait(60)
        raise OpError("no header")

    class Clock:
        monotonic, perf_counter = time.monotonic, time.perf_counter

        @staticmethod
        def sleep(seconds: float) -> None:
            waits.set()
            time.sleep(seconds)

    compiling.compiler()
    monkeypatch.setattr(compiling, "_run", fails)
    monkeypatch.setattr(compiling, "time", Clock)
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(compiling.compiled, twice, "") for _ in range(2)]:
            with pytest.raises(OpError, match=r"^no header$"):
                each.result(60)
    assert len(calls) == 1
    with pytest.raises(OpError):  # whoever comes later looks itself
        compiling.compiled(twice, "")
    assert len(calls) == 2


def test_what_a_killed_process_has_left_is_removed(anew, twice) -> None:
    """And not what others are making now."""
    left, held = (anew / f"unfinished-{compiling._name(twice, '')}-{each}" for each in "ab")
    for each in (left, held):
        each.mkdir(parents=True)
        (each / "twice.so").write_bytes(b"half")
    anew.chmod(0o700)
    with compiling._held(held):
        library = compiling.compiled(twice, "")
    assert libraries(anew) == {held, library}


def test_who_has_begun_and_does_not_end_is_not_waited_for(anew, twice, monkeypatch) -> None:
    """As a process that was stopped."""
    anew.mkdir(parents=True)
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.1)
    with compiling._locked(anew / f"{compiling._name(twice, '')}.lock", wait=True):
        with pytest.raises(BlockingIOError):
            compiling.compiled(twice, "", wait=False)
        monkeypatch.setattr(
            compiling, "_run", lambda command, _: Path(command[-1]).write_bytes(b"x")
        )
        assert compiling.is_whole(compiling.compiled(twice, ""))


def test_where_files_have_no_locks_everybody_compiles(anew, twice, monkeypatch) -> None:
    """As on some clusters, whose homes are on file systems without them."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    for wait, number in ((True, "float"), (False, "bf16")):
        assert compiling.is_whole(compiling.compiled(twice, number, wait=wait))


def test_a_user_without_a_home_gets_no_folder_elsewhere(anew, monkeypatch) -> None:
    """As in a container whose user nobody knows; the reason is said, and others compute."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.chdir(anew.parent.parent)
    with pytest.raises(RuntimeError, match="home"):
        compiling.library(SOURCE, "float")
    assert not list(Path.cwd().iterdir())


def test_all_that_is_read_beside_modules_is_installed() -> None:
    """A source that is left out of the package is missed on the machines of others alone."""
    home = REPOSITORY / "src" / "reprise"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "."], cwd=home, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no repository")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["reprise"]
    installed = {each for pattern in patterns for each in home.glob(pattern)}
    files = {
        home / each for each in listed.stdout.split("\0") if each and Path(each).suffix != ".py"
    }
    assert files - installed == set()

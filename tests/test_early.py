"""The compiler's fingerprint: Triton's own, read beside an import without many turns."""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reprise import early


class Compiler(ModuleType):
    """Fingerprints itself as Triton does: files in pieces, by whatever ``open`` it finds."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__("triton.runtime.cache")
        self.pieces: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.times = 0

        @functools.cache
        def triton_key() -> str:
            self.times += 1
            self.begun.set()
            assert self.go_on.wait(60)
            return "-".join(map(self._sum, files))

        self.triton_key = triton_key

    def _sum(self, path: Path) -> str:
        found = hashlib.sha256()
        with vars(self).get("open", open)(path, "rb") as file:
            while chunk := file.read(1 << 10):
                self.pieces.append(len(chunk))
                found.update(chunk)
        return found.hexdigest()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    for number, count in enumerate((5000, 1 << 10, 4)):
        (tmp_path / f"{number}").write_bytes(bytes(range(256)) * count)
    made = Compiler([tmp_path / f"{number}" for number in range(3)])
    parents: list[tuple[str, Any]] = [
        ("triton", ModuleType("triton")),
        ("triton.runtime", ModuleType("triton.runtime")),
        ("triton.runtime.cache", made),
    ]
    for name, module in parents:
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(early, "WHOLE", 1 << 18)
    return made


def test_large_files_are_read_in_one_piece_and_the_fingerprint_is_the_same(
    compiler: Compiler,
) -> None:
    early.fingerprint_compiler()
    assert compiler.pieces == [5000 * 256, 1 << 18, 1 << 10]
    found = compiler.triton_key()
    compiler.triton_key.cache_clear()
    assert compiler.triton_key() == found
    assert len(compiler.pieces) == 3 + 1250 + 256 + 1, "Triton's own open is back"


def test_threads_that_come_at_once_read_once(compiler: Compiler) -> None:
    compiler.go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(early.fingerprint_compiler) for _ in range(2)]
        try:
            assert compiler.begun.wait(60)
            assert not any(each.done() for each in both)
        finally:
            compiler.go_on.set()
        for each in both:
            each.result(60)
    assert compiler.times == 1


def test_others_open_files_meanwhile_as_ever(compiler: Compiler, tmp_path: Path) -> None:
    """The kernel cache reads and writes through the same module."""
    compiler.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(early.fingerprint_compiler)
        try:
            assert compiler.begun.wait(60)
            opened = vars(compiler)["open"]
            with opened(tmp_path / "new", "w") as file:
                file.write("text")
            with opened(tmp_path / "new") as file:
                assert file.read(2) == "te"
            with opened(tmp_path / "2", "rb") as file:
                assert len(file.read(10)) == 10
        finally:
            compiler.go_on.set()
        under_way.result(60)
    assert "open" not in vars(compiler)


def test_what_the_first_kernel_asks_the_system_is_asked(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whichever backends there are; one that finds nothing keeps no other from it."""
    asked: list[str] = []

    def nothing() -> None:
        asked.append("nothing")
        raise AssertionError("no driver")

    for name, function, answer in (
        ("triton.runtime.build", "platform_key", lambda: asked.append("processor")),
        ("triton.backends.one.driver", "library_dirs", nothing),
        ("triton.backends.other.driver", "library_dirs", lambda: asked.append("driver")),
    ):
        module = ModuleType(name)
        vars(module)[function] = answer
        monkeypatch.setitem(sys.modules, name, module)
    early.prepare_compiler()
    assert compiler.times == 1
    assert {"processor", "nothing", "driver"} <= set(asked)


def test_what_speaks_with_a_driver_is_built_and_one_that_is_not_there_keeps_none_from_it(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    class OneUtils:
        def __init__(self) -> None:
            raise RuntimeError("no driver")

    class TwoUtils:
        def __init__(self) -> None:
            built.append("two")

    for name, kind in (("one", OneUtils), ("two", TwoUtils)):
        module = ModuleType(f"triton.backends.{name}.driver")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    early.build_drivers()
    assert built == ["two"]


@pytest.mark.parametrize("missing", [True, False])
def test_kernels_are_compiled_beside_where_there_is_a_driver_and_some_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    """Begun first: what it imports takes as long as torch."""
    order: list[Any] = []
    monkeypatch.setattr(early.compiling, "begin", lambda *args: None)
    monkeypatch.setattr(early.platforms, "wake", lambda device, beside: beside())
    monkeypatch.setattr(early.kernels_beside, "remember", order.append)

    def begun() -> bool:
        order.append("begun")
        return missing

    monkeypatch.setattr(early.kernels_beside, "begin_unless_kept", begun)
    for name in ("prepare_compiler", "build_drivers"):
        monkeypatch.setattr(early, name, functools.partial(order.append, name))
    early.begin({"model": "some"})
    built = ["build_drivers"] if missing else []
    assert order == [{"model": "some"}, "begun", "prepare_compiler", *built]

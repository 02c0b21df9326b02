"""What is compiled beside, and what here where that fails."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from typing import Any

import pytest

from reprise import kernels_beside

_found: dict[str, dict[str, Any]] = {}


@pytest.fixture
def found(no_device: None, compiling: Any) -> dict[str, dict[str, Any]]:
    """By scenario, all of one process."""
    if not _found:
        for line in compiling("hand_over.py"):
            each = json.loads(line)
            _found[each.pop("scenario")] = each
    return _found


def test_kernels_that_are_asked_for_are_not_launched(found) -> None:
    assert found["asked"]["launched"] == found["asked"]["generated"] == []
    assert found["asked"]["asked"] == 3


def test_a_kernel_that_was_compiled_beside_is_not_compiled_again(found) -> None:
    """Though a program may have set the directory for its own process alone."""
    assert found["called"]["launched"] == ["rms_norm_kernel"] * 2
    assert found["called"]["generated"] == found["called"]["told"] == []


def test_a_kernel_that_no_module_has_is_compiled_here(found) -> None:
    assert found["of no module"]["launched"] == ["nowhere_kernel"]
    assert found["of no module"]["generated"] == ["nowhere_kernel"]
    (told,) = found["asked"]["told"]
    assert "nowhere_kernel is compiled in this process" in told


def test_a_kernel_that_does_not_compile_is_tried_here_and_says_why(found) -> None:
    case = found["does not compile"]
    assert case["generated"] == ["rms_norm_kernel"]
    assert "power of 2" in case["raised"]
    assert "power of 2" in case["told"][0]


def test_a_process_that_dies_costs_its_kernels_alone(found) -> None:
    for scenario in ("the process dies", "it is dead"):
        case = found[scenario]
        assert case["launched"] == case["generated"] == ["rms_norm_kernel"], scenario
        (told,) = case["told"]
        assert "the process that compiles kernels has ended" in told


def test_few_kernels_begin_no_process(found) -> None:
    assert found["of few"]["generated"] == ["rms_norm_kernel"]
    assert not found["of few"]["begun"]


def test_a_process_is_begun_for_what_every_start_needs_and_only_if_it_is_missing(found) -> None:
    assert not found["all kept"]["begun"]
    assert not found["all kept"]["generated"]
    assert found["one is missing that all have"]["begun"]


class Place(SimpleNamespace):
    name, key = "kernel", "key"


class Source(SimpleNamespace):
    name = "kernel"

    def make_ir(self) -> str:
        return "compiled"


def compiler(source: Source, **options: Any) -> str:
    """Finds nothing in its cache."""
    return source.make_ir()


def test_who_is_interrupted_waits_no_longer_and_compiles_nothing(monkeypatch) -> None:
    pytest.importorskip("triton")
    from reprise.ops import handed_over

    beside = SimpleNamespace(ready=SimpleNamespace(is_set=lambda: True))
    monkeypatch.setattr(kernels_beside, "_beside", beside)
    monkeypatch.setattr(handed_over._Place, "of", lambda *args: Place())
    start = handed_over.Start()
    asked = start._asked["key"] = Future()
    raised: list[BaseException] = []

    def call() -> None:
        try:
            start.compile(compiler, Source(), None, {}, {})
            pytest.fail("it was compiled")
        except BaseException as error:
            raised.append(error)

    waiting = threading.Thread(target=call)
    waiting.start()
    start.abandon()
    waiting.join(60)
    call()  # another kernel of an op that was under way
    assert [type(each) for each in raised] == [CancelledError] * 2
    assert not asked.set_running_or_notify_cancel(), "whoever answers sees it"


def test_who_waits_for_a_kernel_waits_for_its_launcher_too(monkeypatch) -> None:
    """Else this process would build it once more, and a thread that does has a C compiler to wait
    for; one that could not be built beside is built here."""
    pytest.importorskip("triton")
    from reprise.ops import handed_over

    beside = SimpleNamespace(ready=SimpleNamespace(is_set=lambda: True))
    monkeypatch.setattr(kernels_beside, "_beside", beside)
    monkeypatch.setattr(handed_over._Place, "of", lambda *args: Place())
    source = Source(signature={"x": "*fp32"}, constants={})

    def kept(source: Source, **options: Any) -> str:
        return "kept"

    for finds in (compiler, kept):
        for error in (None, kernels_beside.Ended("no C compiler")):
            start = handed_over.Start()
            kernel = start._asked["key"] = Future()
            launcher = start._launchers[handed_over._signature(source)] = Future()
            found: list[Any] = []
            waiting = threading.Thread(
                target=lambda s=start, f=finds, to=found: to.append(
                    s.compile(f, source, None, {}, {})
                )
            )
            waiting.start()
            kernel.set_result(1.0)
            waiting.join(0.05)
            assert waiting.is_alive()
            assert not found
            launcher.set_result(1.0) if error is None else launcher.set_exception(error)
            waiting.join(60)
            assert found == [finds(source)]


def test_another_triton_compiles_in_this_process_as_ever(monkeypatch, caplog) -> None:
    pytest.importorskip("triton")
    from reprise.ops import handed_over

    def unknown(*args: Any) -> None:
        raise AttributeError("get_cache_key")

    monkeypatch.setattr(handed_over._Place, "of", unknown)
    caplog.set_level("INFO")
    assert handed_over.Start().compile(compiler, Source(), None, {}, {}) == "compiled"
    assert "kernel is compiled in this process: " in caplog.text

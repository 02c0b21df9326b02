"""Tensors copied in threads: the same values as copied one by one, and nothing left behind."""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from reprise.errors import LoadError
from reprise.loading import transfer as module
from reprise.loading.transfer import Copy, Lane, StagedLane, transfer
from reprise.platforms import Platform

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@pytest.fixture(params=["platform's", "staged"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a CPU copies through staging buffers, as an accelerator must."""
    if request.param == "staged":
        monkeypatch.setattr(module, "Lane", StagedLane)


@pytest.fixture(params=["threads", "the caller"])
def made_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes are copied without threads."""
    if request.param == "threads":
        monkeypatch.setattr(module, "FEW_BYTES", -1)


def copies(platform: Platform, count: int, rows: int = 64) -> list[Copy]:
    """Of [rows, 4] float32 each, from rising numbers to zeros."""
    sources = torch.arange(count * rows * 4, dtype=torch.float32).view(count, rows, 4)
    return [
        Copy(f"tensor {i}", each, torch.zeros(rows, 4, device=platform.device))
        for i, each in enumerate(sources)
    ]


def assert_same(target: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(target.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def workers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("reprise-weights")]


# ---- values ------------------------------------------------------------------------------


CASES = st.tuples(
    st.lists(st.integers(0, 7), max_size=3),
    st.sampled_from(DTYPES[:3]),
    st.sampled_from(DTYPES[:3]),
    st.booleans(),
)
"""Shape, dtype in the file, dtype of the target, and whether the target's rows lie apart."""


@pytest.mark.usefixtures("lane")
@settings(max_examples=60)
@example(cases=[([1], torch.float32, torch.float32, True)], staging=1, few=False)
@given(cases=st.lists(CASES, max_size=6), staging=st.integers(1, 300), few=st.booleans())
def test_any_shapes(platform: Platform, cases: list[Any], staging: int, few: bool) -> None:
    made = []
    for number, (shape, stored, wanted, apart) in enumerate(cases):
        source = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(stored)
        room = torch.zeros([*shape, 2 if apart else 1], dtype=wanted, device=platform.device)
        made.append(Copy(f"{number}", source, room[..., 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STAGING_BYTES", staging)
        if not few:
            patch.setattr(module, "FEW_BYTES", -1)
        transfer(made, platform)
    for each in made:
        assert_same(each.target, each.source.to(each.target.dtype))


@pytest.mark.usefixtures("lane")
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES[:3], ids=str)
def test_conversion_gives_the_bits_that_torch_gives(
    platform: Platform, stored: torch.dtype, wanted: torch.dtype
) -> None:
    """Random bits: subnormal numbers, infinities and ties in rounding are among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(256, (1 << 20,), dtype=torch.uint8, generator=generator)
    source = bits.view(stored)
    expected = torch.empty(source.shape, dtype=wanted, device=platform.device)
    expected.copy_(source)
    target = torch.zeros_like(expected)
    transfer([Copy("bits", source, target)], platform)
    assert_same(target, expected.cpu())


@pytest.mark.usefixtures("lane", "made_by")
@pytest.mark.parametrize("rows", [127, 128, 129, 1000])
def test_tensor_larger_than_a_buffer(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(module, "STAGING_BYTES", 128 * 16)
    (copy,) = copies(platform, 1, rows)
    assert len(list(copy.pieces(module.STAGING_BYTES))) == -(-rows // 128)
    transfer([copy], platform)
    assert_same(copy.target, copy.source)


def test_many_turns_of_every_buffer(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a buffer was filled again before the device has read it, some of them would be wrong."""
    monkeypatch.setattr(module, "STAGING_BYTES", 1 << 16)
    for _ in range(3):
        made = copies(platform, 4, 1 << 17)
        transfer(made, platform)
        for each in made:
            assert_same(each.target, each.source)


@pytest.mark.usefixtures("made_by")
def test_parameters_of_inference_mode(platform: Platform) -> None:
    """Other threads may write to them only in the mode, too."""
    with torch.inference_mode():
        made = copies(platform, 3)
        transfer(made, platform)
    for each in made:
        assert_same(each.target, each.source)


@pytest.mark.usefixtures("lane")
def test_little_is_copied_without_threads(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model starts in less time than they take to begin."""
    begun: list[str] = []
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *given: begun.append(given[1]))
    made = copies(platform, 25)
    transfer(made, platform)
    for each in made:
        assert_same(each.target, each.source)
    assert not begun
    monkeypatch.setattr(module, "FEW_BYTES", sum(each.target.nbytes for each in made) - 1)
    with pytest.raises(AttributeError):
        transfer(made, platform)
    assert begun == ["reprise-weights"]


@pytest.mark.usefixtures("made_by")
def test_nothing_to_copy(platform: Platform) -> None:
    transfer([], platform)


# ---- progress and failure ----------------------------------------------------------------


def test_progress_is_told_by_the_calling_thread(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[threading.Thread, int, int]] = []
    begun = threading.Event()

    class Bar:
        what, total = "", 3

        def show(self, what: str, done: int, total: int) -> None:
            shown.append((threading.current_thread(), done, total))
            begun.set()

    @contextlib.contextmanager
    def progress(what: str, total: int) -> Iterator[Bar]:
        assert "MiB" in what
        assert total == 3
        yield Bar()

    def slowly(self: Lane, target: Tensor, source: Tensor, offset: float) -> None:
        assert begun.wait(100)

    monkeypatch.setattr(module, "FEW_BYTES", 0)
    monkeypatch.setattr(module, "progress", progress)
    monkeypatch.setattr(module, "WORKERS", 1)
    monkeypatch.setattr(module, "SHOW_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(Lane, "copy", slowly)
    monkeypatch.setattr(StagedLane, "copy", slowly)
    transfer(copies(platform, 3, 1 << 16), platform)
    assert {each[0] for each in shown} == {threading.current_thread()}
    done = [each[1] for each in shown]
    assert done == sorted(done)
    assert len(set(done)) > 1
    assert shown[-1][1:] == (3, 3)


class DeviceLostError(Exception):
    pass


@pytest.mark.usefixtures("lane", "made_by")
def test_failure_names_the_tensor_and_stops_the_others(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = copies(platform, 200)
    attempts: list[int] = []
    plain = Lane.copy

    def copy(self: Lane, target: Tensor, source: Tensor, offset: float) -> None:
        attempts.append(1)
        # What is on its way when one fails takes long: the others have time to be stopped.
        time.sleep(0.01 if len(attempts) < 20 else 0.3)
        if float(source[0, 0]) == float(made[5].source[0, 0]):
            raise DeviceLostError("the device is gone")
        plain(self, target, source, offset)

    monkeypatch.setattr(Lane, "copy", copy)
    with pytest.raises(LoadError, match=r"^tensor 5 .*the device is gone") as caught:
        transfer(made, platform)
    assert isinstance(caught.value.__cause__, DeviceLostError)
    assert len(attempts) < 100
    assert not workers()


@pytest.mark.usefixtures("made_by")
def test_first_use_of_the_device_fails(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any) -> None:
        raise RuntimeError("no memory can be pinned")

    monkeypatch.setattr(Lane, "__init__", init)
    with pytest.raises(LoadError, match="no memory can be pinned"):
        transfer(copies(platform, 9), platform)
    assert not workers()


@pytest.mark.usefixtures("lane", "made_by")
def test_interrupt(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stops within the pieces that are under way."""
    attempts: list[int] = []

    def copy(*_: Any) -> None:
        attempts.append(1)
        if len(attempts) == 10:
            _thread.interrupt_main()
        time.sleep(0.02 if len(attempts) < 10 else 0.3)

    monkeypatch.setattr(Lane, "copy", copy)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        transfer(copies(platform, 1000), platform)
    assert time.perf_counter() - began < 60
    assert len(attempts) < 200
    assert not workers()
    monkeypatch.undo()
    made = copies(platform, 20)
    transfer(made, platform)
    for each in made:
        assert_same(each.target, each.source)

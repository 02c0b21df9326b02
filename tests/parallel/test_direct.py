"""Memory that ranks read from each other is used if sums over it are right on every rank."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reprise import ops, platforms
from reprise.distributed import Communicator, Group
from reprise.errors import ConfigError
from reprise.parallel import direct
from reprise.parallel.direct import COUNTS, part, prove_direct


class Others:
    """The other ranks say this."""

    size = 2

    def __init__(self, ok: bool) -> None:
        self.ok = ok
        self.heard: list[bool] = []

    def all(self, ok: bool) -> bool:
        self.heard.append(ok)
        return ok and self.ok

    def largest(self, value: float) -> float:
        return value


def outcome(
    monkeypatch: pytest.MonkeyPatch,
    sums: Any,
    others: Others,
    runs: str | None = None,
    chosen: dict[str, str] | None = None,
    reached: bool = True,
) -> bool:
    """Whether the memory is kept."""
    group = Group("direct", 0, 2)
    found = Communicator(group)
    if reached:
        found.symmetric = SimpleNamespace(give_up=lambda: None, close=lambda: None)  # type: ignore[assignment]
    else:
        found.drop_symmetric("no peer access")
    monkeypatch.setattr(direct, "_sums_are_right", sums)
    triton = ops.all_reduce.implementations["triton"]
    monkeypatch.setattr(triton, "requires", lambda platform: runs)
    monkeypatch.setattr(triton, "target", lambda x, group: None)
    prove_direct(found, platforms.resolve("cpu"), others, chosen or {})  # type: ignore[arg-type]
    return found.symmetric is not None


def fails(*what: object) -> bool:
    raise RuntimeError("an illegal access")


def test_right_sums_everywhere_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch, lambda *_: True, Others(True))


def test_one_wrong_sum_ends_it_on_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every rank is asked, whatever it found: others would wait for its answer."""
    for sums, others, reason in (
        (lambda *_: False, Others(True), "they are wrong"),
        (lambda *_: True, Others(False), "another rank's are"),
        (fails, Others(True), "an illegal access"),
    ):
        caplog.clear()
        assert not outcome(monkeypatch, sums, others)
        assert len(others.heard) == 1
        assert reason in caplog.text


@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_add"])
def test_what_was_asked_for_by_name_is_refused_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, op: str
) -> None:
    """Nothing else computes in its place; who asked for nothing gets the backend and a line."""
    chosen = {op: "triton"}
    good = (lambda *_: True, Others(True))
    for case, told in (
        ({"reached": False}, "no peer access"),
        ({"runs": "Triton cannot run here"}, "Triton cannot run here"),
    ):
        with pytest.raises(ConfigError, match=rf"--op {op}=triton: .*{told}.*leave it out.* gloo"):
            outcome(monkeypatch, *good, **case, chosen=chosen)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert not outcome(monkeypatch, *good, **case, chosen={op: "reference"})
        assert told in caplog.text
    for sums, others, told in (
        (lambda *_: False, Others(True), "they are wrong"),
        (lambda *_: True, Others(False), "another rank's are"),
    ):
        with pytest.raises(ConfigError, match=rf"--op {op}=triton: .*sums over it: {told}"):
            outcome(monkeypatch, sums, others, chosen=chosen)
    assert outcome(monkeypatch, *good, chosen=chosen)


def test_without_its_kernel_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(True)
    assert not outcome(monkeypatch, fails, others, runs="Triton cannot run here")
    assert not others.heard


def test_what_ranks_add_is_exact_in_every_dtype() -> None:
    """Else a right sum of rounded numbers would be another one than the rounded sum."""
    for rank in range(16):
        for turn, count in enumerate(COUNTS * 2):
            numbers = part(rank, turn, count)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                assert torch.equal(numbers.to(dtype).long(), numbers)
    assert not torch.equal(part(0, 0, 8), part(1, 0, 8))


def test_it_is_proven_on_the_device_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that starts an engine may have another one, and the other ranks would wait for a
    kernel that runs there."""
    done: list[str] = []
    monkeypatch.setattr(type(platforms.resolve("cpu")), "activate", lambda _: done.append("device"))
    assert outcome(monkeypatch, lambda *_: done.append("sums") is None, Others(True))
    assert done == ["device", "sums"]

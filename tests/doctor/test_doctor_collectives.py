"""``reprise doctor collectives``: sums of several processes."""

from __future__ import annotations

import os

import pytest
from helpers import need_devices

from reprise.doctor import collectives
from reprise.errors import ConfigError, RanksError


def test_sums_are_timed_and_compared(device: str) -> None:
    need_devices(device, 2)
    report = collectives.measure(device, 2, (1 << 13, 1 << 15))
    backend = [each for each in report["sums"] if each["implementation"] == "reference"]
    assert [each["bytes"] for each in backend] == [1 << 13, 1 << 15]
    direct = [each for each in report["sums"] if each["implementation"] == "triton"]
    assert report["reads_directly"] == bool(direct)
    for each in report["sums"]:
        assert each["bits_equal"]
        assert each["us"] > 0
        assert each["gb_per_s"] == pytest.approx(each["bytes"] / each["us"] / 1e3)
    assert all(each["difference"] == 0 for each in report["sums"])


def test_a_rank_that_hangs_is_named_and_ended(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_devices(device, 2)
    monkeypatch.setattr(collectives, "START_SECONDS", 0.0)
    monkeypatch.setattr(collectives, "ENOUGH_SECONDS", 0.0)
    began: list[int] = []
    popen = collectives.subprocess.Popen

    def start(*what: object, **options: object) -> object:
        child = popen(*what, **options)  # type: ignore[call-overload]
        began.append(child.pid)
        return child

    monkeypatch.setattr(collectives.subprocess, "Popen", start)
    with pytest.raises(RanksError, match=r"rank 0 does not answer; .*NCCL_P2P_DISABLE=1"):
        collectives.measure(device, 2, (1 << 13,))
    assert len(began) == 2
    for pid in began:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_rank_has_none() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=1"):
        collectives.measure("cpu", 1)

"""Try every contract on a platform."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from reprise import platforms
from reprise.doctor.conformance.contract import CONTRACTS, Broken, Contract, Kit, Skipped
from reprise.platforms import Platform

Verdict = Literal["pass", "fail", "skip"]
KIT = 2
"""Rises when contracts change, so that published verdicts can be compared."""


@dataclass
class Outcome:
    """One contract's verdict."""

    name: str
    group: str
    summary: str
    verdict: Verdict
    detail: str
    seconds: float


@dataclass
class Conformance:
    """What a hardware team publishes."""

    facts: dict[str, Any]
    """Device, versions, date, command."""
    chosen: list[str] = field(default_factory=list)
    """Names of the contracts to be tried, in their order."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Results of the contracts that were tried, in the same order."""
    ended: str | None = None
    """Why not all were tried; None: they were, or are being."""

    @property
    def failed(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.verdict == "fail"]

    @property
    def not_tried(self) -> list[str]:
        return self.chosen[len(self.outcomes) :]

    @property
    def conforms(self) -> bool | None:
        """None: what was tried holds, and some was not tried."""
        return False if self.failed else None if self.not_tried else True

    def count(self, verdict: Verdict) -> int:
        return sum(each.verdict == verdict for each in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "kit": KIT,
            "conforms": self.conforms,
            **self.facts,
            "counts": {each: self.count(each) for each in ("pass", "fail", "skip")},
            "ended": self.ended,
            "not_tried": self.not_tried,
            "contracts": [dataclasses.asdict(each) for each in self.outcomes],
        }


def select(patterns: Sequence[str] = ()) -> list[Contract]:
    """Contracts whose name or group matches one of the patterns; all, if there are none."""
    if not patterns:
        return list(CONTRACTS.values())
    return [
        each
        for each in CONTRACTS.values()
        if any(fnmatch.fnmatch(e, p) for e in (each.name, each.group) for p in patterns)
    ]


def attempts(
    device: str, facts: dict[str, Any], chosen: Sequence[Contract]
) -> Iterator[Conformance]:
    """Try contracts one after the other; none can stop the next.

    Only a device that answers nothing more can: what it was not asked is skipped by that reason,
    so that the one contract that lost it stands out.

    Args:
        device: As users write it.
        facts: For the report: versions, date, command.
        chosen: The contracts to try.

    Yields:
        The one report, before the first contract and behind each: a caller that stops in between
        has all that was found.

    Raises:
        PlatformError: The device is unknown or not on this machine.
    """
    platform = platforms.resolve(device)
    platform.activate()
    report = Conformance(
        {
            **facts,
            "platform": platform.name,
            "platform_class": f"{type(platform).__module__}.{type(platform).__qualname__}",
            "device": str(platform.device),
            "device_name": platform.device_name,
            "memory_total": platform.memory_info().total,
        },
        [each.name for each in chosen],
    )
    yield report
    kit = Kit(platform, device)
    lost: str | None = None
    for each in chosen:
        began = time.perf_counter()
        verdict, detail = _try(each, kit) if lost is None else _skip(lost)
        if verdict == "fail" and not _answers(platform):
            detail += " (the device answers nothing since)"
            lost = f"not tried: the device was lost in {each.name}; try it alone with --only"
        seconds = round(time.perf_counter() - began, 3)
        report.outcomes.append(
            Outcome(each.name, each.group, each.summary, verdict, detail, seconds)
        )
        yield report


def conformance(device: str, facts: dict[str, Any], chosen: Sequence[Contract]) -> Conformance:
    """The report on all of them; arguments and errors as of :func:`attempts`."""
    *_, report = attempts(device, facts, chosen)
    return report


def _answers(platform: Platform) -> bool:
    """Whether the device still computes: an illegal access ends a process's every later call."""
    try:
        return torch.ones(2, device=platform.device).sum().item() == 2
    except Exception:
        return False


def _skip(reason: str) -> tuple[Verdict, str]:
    return "skip", reason


def _try(each: Contract, kit: Kit) -> tuple[Verdict, str]:
    try:
        # What graphs of the one before held: none can be given back while a graph is captured.
        kit.platform.empty_cache()
        return "pass", each.check(kit)
    except Skipped as reason:
        return _skip(str(reason))
    except Broken as broken:
        return "fail", str(broken)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return "fail", f"{type(error).__name__}: {lines[0] if lines else repr(error)}"

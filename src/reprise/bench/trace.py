"""What host and device do during steady decode steps: a trace to look at, and its figures.

Two windows are recorded, one after the other, while the same requests decode. The first records
the device's work alone, and the figures come from it: to record every op on the host takes the
host several times as long as the op itself, and a device that waits for a slowed host looks idle.
The second records the host too, with the engine's spans as named ranges, and becomes the file;
the gaps on its device are wider than without a profiler.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import (
    ProfilerActivity,
    profile,
    record_function,
    schedule,
    supported_activities,
)

from reprise.bench.drive import check_fits, check_served
from reprise.engine import CompletionGroup, Engine, Scheduler
from reprise.engine.groups import Groups
from reprise.errors import RepriseError
from reprise.graphs import GraphRunner
from reprise.runner import ModelRunner, PendingOutput
from reprise.runner.buffers import StepBuffers
from reprise.runner.sampler import Sampler
from reprise.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

STEPS = 20
WARM_UP_STEPS = 4
"""Taken with the profiler on, and not recorded: switching it on slows the first ones."""
SPARE_TOKENS = 128
"""Room that a request needs behind its prompt for the steps before and in both windows."""
CACHE_SHARE = 0.9
"""The requests' share of the cache, so that none is ever preempted."""
TOP_KERNELS = 12

FIGURES = ("ms_per_step", "device_busy_ms", "device_idle_share", "kernels")
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what keeps a device busy in an exported trace, whatever the device's make."""

HOST_PHASES: Sequence[tuple[type, str, str]] = (
    (Engine, "step", "step"),
    (Scheduler, "schedule", "schedule"),
    (ModelRunner, "submit", "submit"),
    (ModelRunner, "sample", "draw"),
    (StepBuffers, "fill", "fill inputs"),
    (GraphRunner, "run", "launch"),
    (Sampler, "__call__", "sample"),
    (PendingOutput, "wait", "wait"),
    (Groups, "take", "take results"),
)
"""Class, method, and what its calls are named in the trace. Some lie inside others."""

_ids = itertools.count()


def check_traceable(engine: Engine, longest_prompt: int) -> None:
    """Raise ConfigError if a prompt of so many tokens leaves no room for the traced steps."""
    check_fits(engine, longest_prompt + SPARE_TOKENS)


def record_trace(engine: Engine, prompts: Sequence[list[int]], path: Path) -> dict[str, Any]:
    """Trace decode steps of as many of the prompts as can decode at the same time.

    Args:
        engine: Idle, and warm from the same work.
        prompts: Token ids; each was found traceable.
        path: The file to write, in Chrome's trace format; compressed if it ends in ``.gz``.

    Returns:
        ``file``, ``batch_size``, ``context`` (mean tokens of a request after the figures'
        window), ``steps``, and what :func:`device_figures` returns; its fields are None where the
        device has no work of its own that could be recorded.

    Raises:
        RepriseError: Some step was not a decode step of the whole batch.
        OSError: The file cannot be written.
    """
    on_device = device_activities()
    if not engine.platform.asynchronous:
        on_device = set()  # the profiler may know another device than the one that computes
    prompts = _resident(engine, prompts)
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    with _decoding(engine, prompts) as groups:
        if on_device:
            recorded = _record(engine, len(prompts), on_device)
            found = device_figures(exported_events(recorded), STEPS)
            if found is None:
                logger.warning("the profiler saw no work on %s", engine.platform.device)
            figures.update(found or {})
        lengths = [each.completions[0].request.num_tokens for each in groups]
        with _named_spans():
            recorded = _record(engine, len(prompts), {ProfilerActivity.CPU, *on_device})
    with _exported(recorded, path.name) as file:
        shutil.copyfile(file, path)
    return {
        "file": str(path),
        "batch_size": len(prompts),
        "context": round(statistics.mean(lengths)),
        "steps": STEPS,
        **figures,
    }


def device_activities() -> set[ProfilerActivity]:
    """What the profiler can record of devices, in this process as often as need be."""
    # The profiler's library for a device is torn down some time after a recording. That may
    # happen in the middle of the next one, which is then empty; so keep it.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    return set(supported_activities()) - {ProfilerActivity.CPU}


def device_figures(events: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any] | None:
    """Figures of the device from a trace's events; None if there is no kernel among them.

    The window reaches from the start of the first kernel to the end of the device's last work.
    Kernels may overlap, on streams or by an early launch, so busy is the union of their times;
    the times of the single kernels may add up to more.

    Args:
        events: Of a trace in Chrome's format, times in microseconds.
        steps: How many steps the trace holds, each whole.

    Returns:
        ``ms_per_step`` (of the window), ``device_busy_ms`` (a step), ``device_idle_share`` (of
        the window) and ``kernels``: those that take most time, each with its ``name``,
        ``count_per_step``, ``us_per_step`` and ``share`` of the time of all kernels.
    """
    work = [each for each in events if each.get("ph") == "X" and each.get("cat") in DEVICE_WORK]
    began = min((each["ts"] for each in work if each["cat"] == "kernel"), default=None)
    if began is None:
        return None
    # What comes before are copies of the first step's inputs, with the host's launch behind them.
    work = sorted((each for each in work if each["ts"] >= began), key=lambda each: each["ts"])
    times: dict[str, list[float]] = {}
    busy, reached = 0.0, -math.inf
    for each in work:
        ended = each["ts"] + each["dur"]
        busy += max(0.0, ended - max(each["ts"], reached))
        reached = max(reached, ended)
        times.setdefault(each["name"], []).append(each["dur"])
    window = reached - began
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP_KERNELS]
    total = sum(map(sum, times.values()))
    return {
        "ms_per_step": round(window / steps / 1e3, 4),
        "device_busy_ms": round(busy / steps / 1e3, 4),
        "device_idle_share": round(1 - busy / window, 4),
        "kernels": [
            {
                "name": name,
                "count_per_step": round(len(each) / steps, 2),
                "us_per_step": round(sum(each) / steps, 2),
                "share": round(sum(each) / total, 4),
            }
            for name, each in most
        ],
    }


def _resident(engine: Engine, prompts: Sequence[list[int]]) -> Sequence[list[int]]:
    """As many of the prompts as fit one step and the cache; at least one."""
    room = CACHE_SHARE * engine.scheduler.cache.capacity
    sizes = [len(each) + SPARE_TOKENS for each in prompts[: engine.config.max_num_seqs]]
    fitting = sum(total <= room for total in itertools.accumulate(sizes))
    return prompts[: max(1, fitting)]


@contextlib.contextmanager
def _decoding(engine: Engine, prompts: Sequence[list[int]]) -> Iterator[list[CompletionGroup]]:
    """Within the block every request has its first token and none ends."""
    groups = [
        engine.add(
            f"trace-{next(_ids)}",
            prompt,
            SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, detokenize=False),
        )
        for prompt in prompts
    ]
    try:
        while not all(each.completions[0].request.output_token_ids for each in groups):
            engine.step()
            check_served(groups)
        yield groups
    finally:
        engine.abort([each.request_id for each in groups])
        while engine.has_work:
            engine.step()


def _record(engine: Engine, batch_size: int, activities: Iterable[ProfilerActivity]) -> profile:
    """Profile steps that begin and end with an idle device, so that all their work is recorded.

    Raises:
        RepriseError: A step was not a decode step of the whole batch.
    """
    # One turn of the profiler is all steps: first those that are not recorded, then the others.
    turns = schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile(activities=activities, schedule=turns) as profiler:
        _advance(engine, WARM_UP_STEPS)
        before = engine.stats().scheduler
        profiler.step()
        _advance(engine, STEPS)
        after = engine.stats().scheduler
    steps = after.total_steps - before.total_steps
    decoded = after.total_decode_tokens - before.total_decode_tokens
    prefilled = after.total_prefill_tokens - before.total_prefill_tokens
    if (steps, decoded, prefilled) != (STEPS, STEPS * batch_size, 0):
        raise RepriseError(
            f"the trace was to hold {STEPS} decode steps of {batch_size} requests, and held "
            f"{steps} steps with {decoded} decoded and {prefilled} prefilled tokens; "
            "trace fewer or shorter requests"
        )
    return profiler


def _advance(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.step()
    engine.platform.synchronize()


def exported_events(recorded: profile) -> list[dict[str, Any]]:
    """By way of a file: the format is the same for every version of torch and every device."""
    with _exported(recorded, "trace.json") as file:
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


@contextlib.contextmanager
def _exported(recorded: profile, name: str) -> Iterator[Path]:
    """A file with the trace, for the block. The profiler does not tell if it could write a file."""
    with tempfile.TemporaryDirectory(prefix="reprise-trace-") as directory:
        file = Path(directory) / name
        recorded.export_chrome_trace(str(file))
        yield file


@contextlib.contextmanager
def _named_spans() -> Iterator[None]:
    """Within the block the host's spans are named ranges for the profiler.

    From the outside, since naming a range costs microseconds even when nothing is recorded.
    """
    originals = [vars(owner)[method] for owner, method, _ in HOST_PHASES]
    try:
        for (owner, method, name), original in zip(HOST_PHASES, originals, strict=True):
            setattr(owner, method, _named(name, original))
        yield
    finally:
        for (owner, method, _), original in zip(HOST_PHASES, originals, strict=True):
            setattr(owner, method, original)


def _named(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run

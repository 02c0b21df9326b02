"""A report of an engine for a bug report: what it decided and why, and nothing private."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import platform as host
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from reprise import platforms
from reprise.bench.drive import random_prompts, run
from reprise.bench.record import heading, versions
from reprise.config import EngineConfig
from reprise.doctor.facts import device_facts, op_facts
from reprise.doctor.scrub import Scrubber, public_name
from reprise.engine import Engine
from reprise.errors import describe

ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
    "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE",
)  # fmt: skip
"""Variables that change how an engine runs; no others are looked at."""
MOST_TOKENS = 256
"""In a made-up prompt."""
NEW_TOKENS = 8
MOST_LINES = 500


def bug_report(
    engine: Engine | None,
    config: EngineConfig | None = None,
    *,
    failure: BaseException | None = None,
    log: Sequence[str] = (),
    steps: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is known of an engine, ready for JSON.

    It has no prompts, no texts and no token ids. Of directories that the user has named the last
    part remains, of others nothing.

    Args:
        engine: Of ``LLM.engine``, at any moment; None: it did not start.
        config: What the engine was to be started with; needed without one.
        failure: What the user saw.
        log: Lines that the engine has logged.
        steps: Of :func:`made_up_steps`.
    """
    config = config if engine is None else engine.config
    assert config is not None, "an engine or its config"
    scrubber = Scrubber([config.model, config.tokenizer])
    report: dict[str, Any] = {
        "report": "reprise doctor report",
        "date": heading("")["date"],
        "versions": versions(),
        "system": _system(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "platforms": platforms.available(),
        "config": _config(config),
    }
    if failure is not None:
        report["failure"] = _failure(failure)
    if engine is not None:
        report |= _engine_facts(engine)
    else:
        report |= _device_alone(config)
    report |= {"steps": dict(steps or {}), "log": list(log[-MOST_LINES:])}
    plain: dict[str, Any] = scrubber.data(_finite(report))
    return plain


def made_up_steps(engine: Engine) -> dict[str, Any]:
    """Complete a few random prompts of several lengths, all at once."""
    limit = min(engine.max_model_len, engine.scheduler.cache.capacity)
    new = max(1, min(NEW_TOKENS, limit - 1))
    longest = max(1, min(MOST_TOKENS, limit - new))
    lengths = [max(1, longest // part) for part in (1, 2, 4, longest)]
    done = run(engine, random_prompts(lengths, engine.vocab_size, seed=0), [new] * len(lengths))
    return {
        "prompt_lens": lengths,
        "new_tokens": new,
        "steps": done.steps,
        "seconds": round(done.seconds, 4),
    }


@contextmanager
def kept_log() -> Iterator[list[str]]:
    """The lines of at least level INFO that the engine logs in this block; what others see of
    the log stays as it is."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    logger = logging.getLogger("reprise")
    keep, level, handlers = Keep(logging.INFO), logger.level, list(logger.handlers)
    levels = [each.level for each in handlers]
    for each in handlers:
        each.setLevel(max(each.level, logger.getEffectiveLevel()))
    logger.addHandler(keep)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield lines
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)
        for each, before in zip(handlers, levels, strict=True):
            each.setLevel(before)


def _engine_facts(engine: Engine) -> dict[str, Any]:
    runner = engine.runner
    return {
        "device": device_facts(engine.platform),
        "model": {
            "architecture": type(runner.model).__name__,
            "parameters": sum(each.numel() for each in runner.model.parameters()),
            "cached_layers": len(runner.model.caches()),
            "vocab_size": engine.vocab_size,
            "dtype": str(runner.dtype).removeprefix("torch."),
            "max_model_len": engine.max_model_len,
        },
        "cache": {
            "num_blocks": runner.num_blocks,
            "block_size": runner.block_size,
            "tables": [
                {"lifetime": str(each.lifetime), "block_size": each.block_size, "pool": each.pool}
                for each in runner.cache_layout.tables
            ],
            "pools": [dataclasses.asdict(each) for each in runner.cache_layout.pools],
            "max_num_batched_tokens": runner.max_tokens,
        },
        "ops": op_facts(runner.ops),
        "graphs": runner.owners.report().to_dict(),
        "startup": {
            "seconds": round(engine.startup_seconds, 3),
            "spans": {name: round(each, 4) for name, each in engine.startup.items()},
        },
        "stats": dataclasses.asdict(engine.stats()),
    }


def _device_alone(config: EngineConfig) -> dict[str, Any]:
    """As much as can be had without an engine."""
    try:
        return {"device": device_facts(platforms.resolve(config.device))}
    except Exception as error:  # it may be what the report is about
        return {"device": {"unusable": describe(error)}}


def _system() -> dict[str, Any]:
    return {
        "os": host.platform(),
        "machine": host.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_build": {
            name: str(value)
            for name in ("cuda", "hip", "xpu", "debug", "git_version")
            if (value := getattr(torch.version, name, None)) is not None
        },
    }


def _config(config: EngineConfig) -> dict[str, Any]:
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    values["model"] = public_name(config.model) or "the demo model"
    values["tokenizer"] = public_name(config.tokenizer)
    return values


def _failure(error: BaseException) -> dict[str, Any]:
    """The error, and the places that it came through, without the source's text."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": f"{type(error).__name__}: {error}",
        "traceback": [f"{each.filename}:{each.lineno} in {each.name}" for each in frames],
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become text."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

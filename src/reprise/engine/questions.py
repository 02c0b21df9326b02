"""What may be asked of an engine beside generation, and what the answers of several are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprise.engine.engine import Engine
from reprise.engine.stats import stats_of_all
from reprise.graphs import GraphReport
from reprise.graphs.report import total as total_of_reports
from reprise.metrics import Metric


@dataclass(frozen=True)
class Question:
    """One thing that can be asked."""

    answer: Callable[..., Any]
    """Of one engine, in its thread; with the arguments behind it."""
    of_all: Callable[[Sequence[Any]], Any]
    """What the answers of several engines are together."""


def _reset(engine: Engine) -> bool:
    engine.scheduler.reset_prefix_cache()
    return True


def _update(engine: Engine, weights: Any) -> None:
    engine.finish_steps()
    engine.update_weights(weights)


def _start_profile(engine: Engine, directory: str | os.PathLike[str] | None) -> None:
    engine.profiler.start(directory)


def _graphs(engine: Engine) -> GraphReport:
    return engine.runner.owners.report()


def _metrics_of_all(found: Sequence[list[Metric]]) -> list[Metric]:
    """Each with the label ``engine``, as vLLM has it."""
    return [
        dataclasses.replace(each, labels={**each.labels, "engine": str(index)})
        for index, metrics in enumerate(found)
        for each in metrics
    ]


def _directory(files: Sequence[Path]) -> Path:
    return files[0].parent


QUESTIONS = {
    "stats": Question(lambda engine: engine.stats(), stats_of_all),
    "metrics": Question(lambda engine: engine.metrics(), _metrics_of_all),
    "graph_report": Question(_graphs, total_of_reports),
    "reset_prefix_cache": Question(_reset, all),
    "update_weights": Question(_update, lambda found: None),
    "start_profile": Question(_start_profile, lambda found: None),
    # Each engine has a file of its own there.
    "stop_profile": Question(lambda engine: engine.profiler.stop(), _directory),
}


def together(name: str, answers: Sequence[Any]) -> Any:
    """The answers to a question, one of each engine, as one."""
    return answers[0] if len(answers) == 1 else QUESTIONS[name].of_all(answers)

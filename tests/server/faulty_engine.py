"""The engine's process with what a test breaks: FAULT FD.

``step``: every 40th step raises. ``thread``: the 40th step ends the engine's thread. ``lost``: a
step raises, and so does every try to start over. ``graph``: graphs go wrong behind their proof.
``graph_on_signal``: they do so on SIGUSR1.
``nan``: logits of every 40th step are no numbers for its first request.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from reprise.config import EngineConfig
from reprise.ops import OpTable
from reprise.ops.registry import all_ops
from reprise.runner import model_runner
from reprise.server.engine_process import main
from reprise.server.engine_server import EngineLimits, EngineServer
from reprise.testing import faults


class Stop(BaseException):
    """What no one catches."""


def make(fault: str) -> Callable[[EngineConfig, EngineLimits], EngineServer]:
    def server(config: EngineConfig, limits: EngineLimits) -> EngineServer:
        planted: list[Any] = []
        if fault.startswith("graph"):
            break_graphs(planted)
        found = EngineServer(config, limits)
        engine: Any = found.driver.engine
        submit, steps = engine.runner.submit, 0

        def failing(step: Any) -> Any:
            nonlocal steps
            steps += 1
            if fault == "graph" and steps == 40:
                for each in planted:
                    each.active.fill_(True)
            elif fault != "graph" and steps % 40 == 0:
                if fault == "thread":
                    raise Stop("now")
                raise RuntimeError("the device is on fire at /some/path")
            return submit(step)

        if fault == "nan":
            spoil_logits(engine)
            return found
        if fault == "graph_on_signal":
            signal.signal(signal.SIGUSR1, lambda *_: [e.active.fill_(True) for e in planted])
            return found
        engine.runner.submit = failing
        if fault == "lost":

            def lost() -> None:
                raise RuntimeError("the device does not answer")

            engine.start_over = lost
        return found

    return server


def spoil_logits(engine: Any) -> None:
    sampler, steps = engine.runner.sampler, 0

    class Spoiling:
        def __call__(self, logits: Any, *arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps % 40 == 0:
                logits = logits.clone()
                logits[0] = float("nan")
            return sampler(logits, *arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(sampler, name)

    engine.runner.sampler = Spoiling()


def break_graphs(planted: list[Any]) -> None:
    """Attention in graphs, which is sound until it is told otherwise."""

    class Broken(OpTable):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            fault = faults.FAULTS["wrong_padded"](self, all_ops()["paged_attention"])
            fault.active.fill_(False)  # type: ignore[attr-defined]
            self.functions["paged_attention"] = fault
            planted.append(fault)

    model_runner.OpTable = Broken  # type: ignore[misc,attr-defined]


if __name__ == "__main__":
    main(make(sys.argv.pop(1)))

"""The process of a server's engine: what its start needs besides torch begins before torch does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from reprise import early
from reprise.config import EngineConfig
from reprise.engine import process
from reprise.server import engine_process


@pytest.mark.parametrize(
    ("options", "begun"),
    [
        ({"device": "cpu"}, 1),
        ({"tensor_parallel_size": 2}, 1),
        ({"data_parallel_size": 2}, 0),
    ],
)  # fmt: skip
def test_early_work_begins_where_the_engine_will_be(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], begun: int
) -> None:
    engine = EngineConfig(**options).arguments()
    start = {"engine": engine, "limits": [1, 2, 3], "log_level": "info", "log_format": "text"}
    seen: list[Any] = []
    monkeypatch.setattr(engine_process, "begin", lambda: ("control", start))
    monkeypatch.setattr("reprise.server.logs.configure", lambda *each: None)
    monkeypatch.setattr(early, "begin", seen.append)
    monkeypatch.setattr(process, "serve", lambda control, make: seen.append((control, make())))
    engine_process.main(lambda config, limits: (config, limits.__class__.__name__))  # type: ignore[arg-type, return-value]
    made = ("control", (EngineConfig(**options), "EngineLimits"))
    assert seen == [*[engine] * begun, made]


def test_its_module_does_not_import_torch() -> None:
    command = "import sys, reprise.server.engine_process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)

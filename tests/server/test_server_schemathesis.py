"""Bodies that a machine makes up from /openapi.json: never a 5xx, never an undeclared reply."""

from __future__ import annotations

import subprocess
import sys

import pytest
from http_server import Server, until

pytest.importorskip("schemathesis", reason="the extra test is not installed")

CHECKS = (
    "not_a_server_error", "content_type_conformance", "response_schema_conformance",
    "status_code_conformance",
)  # fmt: skip


@pytest.mark.parametrize(
    ("phases", "examples", "draws"),
    [
        ("fuzzing", 1, ["--generation-deterministic"]),
        pytest.param(
            "coverage,fuzzing", 100, ["--generation-database", "none"], marks=pytest.mark.long
        ),
    ],
)
def test_made_up_requests(
    stub: Server, phases: str, examples: int, draws: list[str], tmp_path_factory
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{stub.url}/openapi.json",
            "--phases", phases, "--max-examples", str(examples), "--checks", ",".join(CHECKS),
            "--request-timeout", "20", "--no-color", *draws,
            "--exclude-path", "/live",  # its reply has no end
        ],
        cwd=tmp_path_factory.mktemp("schemathesis"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    with stub.client() as client:
        assert client.get("/health").status_code == 200
        until(lambda: client.get("/load").json() == {"server_load": 0})
    assert "Traceback" not in stub.log

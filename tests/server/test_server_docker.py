"""The files for containers, as far as they can be checked without running any."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_server import Server
from typer.testing import CliRunner

from reprise.cli.app import app
from reprise.server.options import ServerOptions

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def test_the_dashboard_asks_for_metrics_that_there_are(server: Server) -> None:
    with server.client() as client:
        client.get("/v1/models")  # counted
        text = client.get("/metrics").text
    # Metrics of graphs by phase are there where graphs are.
    known = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    known |= {f"reprise:{name}" for name in ("graph_replays", "graph_unproven_steps",
              "graphs_quarantined", "graphs_verified", "graphs_captured")}  # fmt: skip
    board = json.loads((DOCKER / "grafana" / "dashboard.json").read_text())
    asked: set[str] = set()
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert place["x"] + place["w"] <= 24
        assert not cells & places
        places |= cells
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            asked |= set(re.findall(r"\b(?:vllm:|reprise:|http_)\w+", expression))
    assert len(asked) > 15
    for name in asked:
        base = re.sub(r"_(total|bucket|sum|count)$", "", name)
        assert {name, base, f"{base}_total"} & known, name


def test_files_that_are_named_are_there() -> None:
    compose: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_file()
            else:
                assert source in compose["volumes"]
    build = compose["services"]["reprise"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    copied = [
        each.split()[1:-1] for each in lines if each.startswith("COPY ") and "--from" not in each
    ]
    assert copied
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {each.removeprefix("!") for each in ignore if each.startswith("!")}
    assert {name for names in copied for name in names} == sent
    (extras,) = re.findall(r"pip install -c constraints.txt '\.\[(.*)\]'", "\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    wait = float(compose["services"]["reprise"]["stop_grace_period"].removesuffix("s"))
    assert wait > ServerOptions().shutdown_timeout
    assert all((ROOT / name).exists() for names in copied for name in names)
    for name in ("prometheus.yaml", "grafana/datasource.yaml", "grafana/provider.yaml"):
        assert isinstance(yaml.safe_load((DOCKER / name).read_text()), dict)


def instructions(name: str) -> list[str]:
    """What is behind each instruction of that name in the Dockerfile."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(name + " ")]


def test_paths_ports_and_names_fit_together() -> None:
    compose: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    published = {name: each["ports"][0].split(":") for name, each in services.items()}
    assert {each[0] for each in published.values()} == {"127.0.0.1"}
    inside = {name: int(each[2]) for name, each in published.items()}
    assert [str(inside["reprise"])] == instructions("EXPOSE")
    assert inside["reprise"] == ServerOptions().port
    scraped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == [f"reprise:{inside['reprise']}"]
    (source,) = yaml.safe_load((DOCKER / "grafana/datasource.yaml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{inside['prometheus']}"
    (provider,) = yaml.safe_load((DOCKER / "grafana/provider.yaml").read_text())["providers"]
    grafana = services["grafana"]
    mounted = {each.split(":")[1] for each in grafana["volumes"]}
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted
    assert str(Path(home).parent) == provider["options"]["path"]
    # What is kept is on the volume, which its user may write to.
    (kept,) = instructions("VOLUME")
    assert services["reprise"]["volumes"] == [f"cache:{kept}"]
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    for name in ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(kept) in Path(variables[name]).parents
    assert variables["XDG_CACHE_HOME"] == kept  # kernels in C++
    (user,) = instructions("USER")
    installed = " ".join(instructions("RUN"))
    assert f"chown {user} {kept}" in installed
    assert re.search(rf"useradd .*\b{user}\b", installed)
    # What compiles for CPUs, by the name that is looked for.
    assert "g++" in re.search(r"apt-get install (.*?)&&", installed)[1].split()  # type: ignore[index]


def test_the_entry_point_and_the_check_of_health_are_commands_that_work(server: Server) -> None:
    (entry,) = map(json.loads, instructions("ENTRYPOINT"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert entry[0] in project["scripts"]
    refused = CliRunner().invoke(app, [*entry[1:], "--port", "99999"])
    assert "--port=99999" in refused.output  # and nothing before it is wrong
    (health,) = instructions("HEALTHCHECK")
    command = json.loads(health[health.index("CMD ") + 4 :])
    address = f"http://127.0.0.1:{ServerOptions().port}/"
    assert address in command[-1]
    assert "/health" in command[-1]
    for url, healthy in ((server.url, True), ("http://127.0.0.1:1", False)):
        program = command[-1].replace(address, f"{url}/")
        done = subprocess.run([sys.executable, *command[1:-1], program], capture_output=True)
        assert (done.returncode == 0) == healthy


def test_what_compose_leaves_empty_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compose: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, value in compose["services"]["reprise"]["environment"].items():
        assert value == f"${{{name}:-}}"
        monkeypatch.setenv(name, "")
    assert ServerOptions().api_key == ()
    monkeypatch.setenv("REPRISE_API_KEY", "k")
    assert ServerOptions().api_key == ("k",)

"""The files for containers, as far as they can be checked without running any."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from http_server import Server

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
    (extras,) = re.findall(r"pip install '\.\[(.*)\]'", "\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    wait = float(compose["services"]["reprise"]["stop_grace_period"].removesuffix("s"))
    assert wait > ServerOptions().shutdown_timeout
    assert all((ROOT / name).exists() for names in copied for name in names)
    for name in ("prometheus.yaml", "grafana/datasource.yaml", "grafana/provider.yaml"):
        assert isinstance(yaml.safe_load((DOCKER / name).read_text()), dict)
    port = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert port["static_configs"][0]["targets"] == ["reprise:8000"]
    (entry,) = (each for each in lines if each.startswith("ENTRYPOINT "))
    assert json.loads(entry.removeprefix("ENTRYPOINT "))[:2] == ["reprise", "serve"]

"""Plots of made-up figures hold every point, at the place where it belongs."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

SVG = "{http://www.w3.org/2000/svg}"
script = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "benchmarks" / "plot_scaling.py"), run_name="plot"
)
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
CONTEXTS = [1024 << n for n in range(6)]


def record(model: str, results: list[dict]) -> dict:
    return {
        "command": "reprise bench latency", "model": model, "dtype": "bfloat16",
        "load_format": "dummy", "device_name": "Some <Device>", "date": "2026-01-02T03:04:05",
        "repeats": 3, "floor": {"copy_tb_per_s": 4.2783},
        "versions": {"reprise": "0.1.0", "torch": "2.11", "triton": None}, "results": results,
    }  # fmt: skip


def by_batch(model: str, fastest: float) -> dict:
    """Steps take longer the larger the batch, and always twice the floor."""
    return record(model, [
        {"batch_size": n, "input_len": 128, "ms_per_step": fastest + n / 100,
         "floor_ms": (fastest + n / 100) / 2}
        for n in BATCHES
    ])  # fmt: skip


def by_context(model: str) -> dict:
    return record(model, [
        {"batch_size": 1, "input_len": n, "ms_per_step": 2 + n / 4096, "floor_ms": 1 + n / 4096}
        for n in CONTEXTS
    ])  # fmt: skip


def draw(tmp_path: Path, *records: dict) -> dict[str, ElementTree.Element]:
    """The plots that the script makes of the records, each in a file of its own."""
    files = []
    for number, each in enumerate(records):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text(json.dumps(each) + "\n\n")
    script["main"]([*map(str, files), "--output", str(tmp_path)])
    return {each.name: ElementTree.parse(each).getroot() for each in tmp_path.glob("*.svg")}


def points(plot: ElementTree.Element, model: str) -> list[tuple[float, float, str]]:
    """Where the measured points of a model are, and what they say when pointed at."""
    circles = [each for each in plot.iter(f"{SVG}circle") if each.find(f"{SVG}title") is not None]
    found = [(float(c.attrib["cx"]), float(c.attrib["cy"]), c[0].text or "") for c in circles]
    return [each for each in found if each[2].startswith(f"{model},")]


def text_of(plot: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in plot.iter(f"{SVG}text")]


def test_every_point_is_in_its_place(tmp_path):
    plots = draw(tmp_path, by_batch("small", 1.0), by_batch("large", 5.0), by_context("small"))
    assert set(plots) == {"scaling-batch.svg", "scaling-context.svg"}
    for name, model, source in [
        ("scaling-batch.svg", "small", by_batch("small", 1.0)),
        ("scaling-batch.svg", "large", by_batch("large", 5.0)),
        ("scaling-context.svg", "small", by_context("small")),
    ]:
        found = points(plots[name], model)
        assert len(found) == len(source["results"])
        # Longer to the right, slower to the top; equal factors are equal distances.
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found))
        gaps = [b[0] - a[0] for a, b in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) < 0.3
        for (_, _, hint), result in zip(found, source["results"], strict=True):
            assert f" {result['ms_per_step']} ms, floor {result['floor_ms']} ms" in hint
            assert script["three"](result["ms_per_step"]) in text_of(plots[name])
        width, height = script["WIDTH"], script["HEIGHT"]
        assert all(script["LEFT"] < x < width - script["RIGHT"] for x, _, _ in found)
        assert all(script["TOP"] < y < height - script["BOTTOM"] for _, y, _ in found)
    small, large = (points(plots["scaling-batch.svg"], each) for each in ("small", "large"))
    assert all(a[1] > b[1] for a, b in zip(small, large, strict=True))


def test_lines_pass_through_the_points_and_floors_lie_below(tmp_path):
    plot = draw(tmp_path, by_batch("small", 1.0))["scaling-batch.svg"]
    lines = []
    for each in plot.iter(f"{SVG}path"):
        if each.attrib["d"].count("L") == len(BATCHES) - 1:
            pairs = [pair.split() for pair in each.attrib["d"].removeprefix("M").split("L")]
            lines.append([(float(x), float(y)) for x, y in pairs])
    floor, measured = lines
    assert measured == [(x, y) for x, y, _ in points(plot, "small")]
    # Always a factor of two, so always the same distance.
    distances = [b[1] - a[1] for a, b in zip(measured, floor, strict=True)]
    assert min(distances) > 0
    assert max(distances) - min(distances) < 0.3


def test_a_plot_says_what_was_measured(tmp_path):
    plot = draw(tmp_path, by_context("small"))["scaling-context.svg"]
    shown = "\n".join(text_of(plot))
    for each in (
        "against context", "small", "Some <Device>", "bfloat16, dummy weights", "2026-01-02",
        "reprise 0.1.0 · torch 2.11 · medians of 3 · copy at 4.28 TB/s", "batch 1",
        "prompt length, tokens", "ms per decode step", "floor:", "1K", "32K",
    ):  # fmt: skip
        assert each in shown
    assert "href" not in ElementTree.tostring(plot, encoding="unicode")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 12, [0.5, 1, 2, 5, 10]),
        (1.4, 4.2, [1.5, 2, 3]),
        (0.93, 1.28, [0.95, 1, 1.2]),
    ],
)
def test_ticks_are_round_and_neither_few_nor_many(low, high, expected):
    assert script["ticks"](low, high) == expected


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record("small", by_context("small")["results"][:1])], "no scaling to plot"),
        ([{"command": "x"}], "no scaling to plot"),
        ([by_batch("small", 1.0), by_batch("small", 2.0)], "of one model: small, small"),
    ],
)
def test_records_that_cannot_be_plotted(records, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        draw(tmp_path, *records)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

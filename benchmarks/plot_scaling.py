"""Plots the time of a decode step against the batch size and against the context, as SVG.

    for work in 0.6b-batches 8b-batches 0.6b-contexts 8b-contexts; do
        reprise bench latency --workload $work --json >> scaling.jsonl
    done
    python benchmarks/plot_scaling.py scaling.jsonl

Each line of the files is one record. Models share a plot; both axes are logarithmic, so that equal
distances are equal factors. Below each measured line is its floor: the time to read the weights,
keys and values once at the copy bandwidth that was measured in the same run.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 122, 64
"""Distances of the plot's frame from the edges."""
MARGIN = 22
"""Between the sides of the frame and the outermost points."""
LEGEND_STEP = 150

INK, SOFT, GRID = "#1d2129", "#626b78", "#e4e7ea"
COLOURS = ("#2f6fb5", "#d98200", "#2a9d74")
STYLE = (
    'text{font:13px system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif;fill:'
    + INK
    + "}.title{font-size:19px;font-weight:600}.soft{fill:"
    + SOFT
    + "}.value{font-size:11.5px;paint-order:stroke;stroke:#fff;stroke-width:4px;"
    "stroke-linejoin:round}"
)


@dataclass(frozen=True)
class Kind:
    """What a plot has along its horizontal axis."""

    key: str
    """Field of a result."""
    other: str
    """Field that stays the same."""
    file: str
    title: str
    label: str
    caption: str
    """For the value of ``other``."""


KINDS = (
    Kind("batch_size", "input_len", "scaling-batch.svg", "batch size",
         "requests in the batch", "prompts of {} tokens"),
    Kind("input_len", "batch_size", "scaling-context.svg", "context",
         "prompt length, tokens", "batch {}"),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Maps a logarithmic axis to units of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)


def kind_of(record: dict[str, Any]) -> Kind:
    """The kind of plot that a record is for.

    Raises:
        ValueError: It is not the record of one batch size or prompt length with several others.
    """
    for kind in KINDS:
        values = {each[kind.key] for each in record.get("results", [])}
        if len(values) > 1 and len({each[kind.other] for each in record["results"]}) == 1:
            return kind
    raise ValueError(
        f"the record of {record.get('command')!r} has no scaling to plot: give records of "
        "'reprise bench latency --json' with several batch sizes or several input lengths"
    )


def plot(kind: Kind, records: Sequence[dict[str, Any]]) -> str:
    """The SVG text of one plot, with a measured line and a floor for each record.

    Raises:
        ValueError: Two records are of the same model, or there are too many.
    """
    models = [each["model"] for each in records]
    if len(models) > len(COLOURS):
        raise ValueError(f"a plot holds {len(COLOURS)} models, not {len(models)}")
    if len(set(models)) < len(models):
        raise ValueError(f"two records against {kind.title} are of one model: {', '.join(models)}")
    results = [each for record in records for each in record["results"]]
    along = sorted({each[kind.key] for each in results})
    times = [each[name] for each in results for name in ("ms_per_step", "floor_ms")]
    x = Scale(along[0], along[-1], LEFT + MARGIN, WIDTH - RIGHT - MARGIN)
    beyond = (max(times) / min(times)) ** 0.06
    y = Scale(min(times) / beyond, max(times) * beyond, HEIGHT - BOTTOM, TOP)
    parts = [
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>',
        *_heading(kind, records),
        *_grid(x, along, y),
        _text(WIDTH / 2, HEIGHT - 18, kind.label, anchor="middle"),
        _text(0, 0, "ms per decode step", anchor="middle",
              more=f'transform="translate(24 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'),
    ]  # fmt: skip
    # Figures come last, so that no line of another model covers them.
    for record, colour in zip(records, COLOURS, strict=False):
        parts += _line(kind, record, x, y, colour)
    parts += [part for each in records for part in _values(kind, each, x, y)]
    parts += _legend(records)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="time of a decode step against {kind.title}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _heading(kind: Kind, records: Sequence[dict[str, Any]]) -> list[str]:
    def each(value: Callable[[dict[str, Any]], object]) -> str:
        return ", ".join(dict.fromkeys(str(value(record)) for record in records))

    copies = sorted(record["floor"]["copy_tb_per_s"] for record in records)
    copy = " to ".join(dict.fromkeys(f"{rate:.3g}" for rate in (copies[0], copies[-1])))
    facts = [
        each(lambda record: record["model"]),
        each(lambda record: f"{record['dtype']}, {record['load_format']} weights"),
        each(lambda record: record["device_name"]),
        kind.caption.format(each(lambda record: record["results"][0][kind.other])),
        each(lambda record: record["date"][:10]),
    ]
    names = [name for name in ("reprise", "torch", "triton") if records[0]["versions"].get(name)]
    software = [f"{name} {each(lambda r, n=name: r['versions'].get(n))}" for name in names]
    medians = f"medians of {each(lambda record: record['repeats'])}"
    return [
        _text(LEFT, 34, f"Time of a decode step against {kind.title}", css="title"),
        _text(LEFT, 56, " · ".join(facts), css="soft"),
        _text(LEFT, 75, " · ".join([*software, medians, f"copy at {copy} TB/s"]), css="soft"),
    ]


def _grid(x: Scale, along: Iterable[int], y: Scale) -> list[str]:
    parts = []
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    for value in along:
        at = x(value)
        parts.append(f'<path d="M{at:.1f} {top}V{bottom}" stroke="{GRID}"/>')
        parts.append(_text(at, bottom + 18, count(value), css="soft", anchor="middle"))
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<path d="M{left} {at:.1f}H{right}" stroke="{GRID}"/>')
        parts.append(_text(left - 9, at + 4.5, f"{value:g}", css="soft", anchor="end"))
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{SOFT}"/>')
    return parts


def _line(kind: Kind, record: dict[str, Any], x: Scale, y: Scale, colour: str) -> list[str]:
    """Floor, measured line, and a marker with its figures at each measured point."""
    results = sorted(record["results"], key=lambda each: each[kind.key])

    def path(name: str, style: str) -> str:
        points = [f"{x(each[kind.key]):.1f} {y(each[name]):.1f}" for each in results]
        return f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" {style}/>'

    return [
        path("floor_ms", FLOOR_STYLE),
        path("ms_per_step", MEASURED_STYLE),
        *(
            f'<circle cx="{x(each[kind.key]):.1f}" cy="{y(each["ms_per_step"]):.1f}" r="4" '
            f'fill="{colour}" stroke="#fff"><title>{esc(record["model"])}, {kind.label} '
            f"{each[kind.key]}: {each['ms_per_step']} ms, floor {each['floor_ms']} ms"
            "</title></circle>"
            for each in results
        ),
    ]


def _values(kind: Kind, record: dict[str, Any], x: Scale, y: Scale) -> list[str]:
    return [
        _text(x(each[kind.key]), y(each["ms_per_step"]) - 10, three(each["ms_per_step"]),
              css="value", anchor="middle")
        for each in record["results"]
    ]  # fmt: skip


def _legend(records: Sequence[dict[str, Any]]) -> list[str]:
    parts, at = [], LEFT
    for record, colour in zip(records, COLOURS, strict=False):
        parts.append(f'<path d="M{at} 98h28" stroke="{colour}" {MEASURED_STYLE}/>')
        parts.append(f'<circle cx="{at + 14}" cy="98" r="4" fill="{colour}" stroke="#fff"/>')
        parts.append(_text(at + 36, 102.5, record["model"]))
        at += LEGEND_STEP
    parts.append(f'<path d="M{at} 98h28" stroke="{SOFT}" {FLOOR_STYLE}/>')
    parts.append(_text(at + 36, 102.5, "floor: weights, keys and values read once"))
    return parts


MEASURED_STYLE = 'stroke-width="2.2" stroke-linejoin="round"'
FLOOR_STYLE = 'stroke-width="1.6" stroke-dasharray="6 4" stroke-opacity="0.75"'

TICK_DIGITS = (
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.4, 1.6, 1.8, *(n / 2 for n in range(4, 20))),
)
"""Of the labels in a decade, coarse to fine; the first that gives enough is taken."""


def ticks(low: float, high: float) -> list[float]:
    """Round values on a logarithmic axis, a few of them whatever its length."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in TICK_DIGITS:
        values = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        found = [each for each in values if low <= each <= high]
        if len(found) >= 3:
            break
    return found


def count(value: int) -> str:
    """``1024`` as ``1K``."""
    return f"{value // 1024}K" if value % 1024 == 0 else str(value)


def three(value: float) -> str:
    """With three digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def esc(value: object) -> str:
    return html.escape(str(value), quote=True)


def _text(
    x: float, y: float, text: str, css: str = "", anchor: str = "start", more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}" {more}>'
        f"{esc(text)}</text>"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="records, one JSON object a line")
    parser.add_argument("--output", type=Path, default=DOCS, help="directory; default: docs/")
    options = parser.parse_args(arguments)
    records = [
        json.loads(line)
        for file in options.files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    try:
        kinds = [kind_of(each) for each in records]
        for kind in KINDS:
            mine = [each for each, its in zip(records, kinds, strict=True) if its is kind]
            if mine:
                target = options.output / kind.file
                target.write_text(plot(kind, mine), encoding="utf-8")
                print(target)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

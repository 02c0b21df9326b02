"""The page's figures as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reprise.doctor.graphs.markup import esc, milliseconds, size
from reprise.doctor.graphs.places import layer_number
from reprise.doctor.graphs.report import Bar, BucketMemory, Timeline, shown

WIDTH = 1240
LEFT, RIGHT = 96, 92
ROW, BAR = 52, 30
LABEL_FROM = 30
"""Bars narrower than this many units carry no text."""


def timeline_figure(lines: Sequence[Timeline]) -> str:
    """One row of bars an executor, on one time axis."""
    longest = max(line.bar_ms for line in lines) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = ROW * len(lines) + 34
    parts = [_axis(longest, scale, height - 24)]
    for row, line in enumerate(lines):
        y = 14 + row * ROW
        name = shown(line.executor)
        parts.append(f"<text x='0' y='{y + 20}'>{esc(name)}</text>")
        x = float(LEFT)
        for bar in line.bars:
            width = bar.ms * scale
            parts.append(_part(bar, x, y, width))
            x += width
        total = milliseconds(line.total_ms)
        parts.append(f"<text x='{x + 8:.1f}' y='{y + 20}'>{esc(total)}</text>")
    return _svg(height, "time of the parts of a step, by executor", parts)


def _part(bar: Bar, x: float, y: int, width: float) -> str:
    shape = (
        f"<rect class='part {bar.kind}' x='{x:.2f}' y='{y}' width='{max(width, 0.6):.2f}' "
        f"height='{BAR}' rx='2' data-tip='{esc(_hint(bar))}'/>"
    )
    text = _caption(bar)
    if width < max(LABEL_FROM, 6.2 * len(text)):
        text = text.split(" ")[0] if bar.kind == "graph" else _layer(bar)
    if not text or width < max(LABEL_FROM - 12, 6.2 * len(text)):
        return shape
    return shape + (
        f"<text class='inside on-{bar.kind}' x='{x + width / 2:.1f}' y='{y + 19}' "
        f"text-anchor='middle'>{esc(text)}</text>"
    )


def _caption(bar: Bar) -> str:
    if bar.kind == "graph":
        return f"graph {len(bar.ops)} ops" if bar.ops else "graph"
    if bar.kind == "rest":
        return ""
    return f"{bar.label.split(' ')[0]} {_layer(bar)}".strip()


def _layer(bar: Bar) -> str:
    number = layer_number(bar.module)
    return "" if number is None else f"L{number}"


def _hint(bar: Bar) -> str:
    lines = [f"{bar.label}: {milliseconds(bar.ms)}"]
    if bar.kind == "break":
        lines[0] = f"break op {lines[0]}"
    if bar.module:
        lines.append(bar.module)
    most = 14
    lines += bar.ops[:most]
    if len(bar.ops) > most:
        lines.append(f"and {len(bar.ops) - most} more ops")
    return "\n".join(lines)


def _axis(longest: float, scale: float, bottom: int) -> str:
    step = 10 ** math.floor(math.log10(longest))
    step *= next(each for each in (0.1, 0.2, 0.25, 0.5, 1, 2) if longest / (step * each) <= 8)
    text = ""
    for tick in range(int(longest / step) + 1):
        x = LEFT + tick * step * scale
        text += f"<line class='axis' x1='{x:.1f}' x2='{x:.1f}' y1='6' y2='{bottom}'/>"
        label = f"{tick * step:g}" + (" ms" if tick == 0 else "")
        text += (
            f"<text class='soft' x='{x:.1f}' y='{bottom + 16}' text-anchor='middle'>{label}</text>"
        )
    return text


def memory_figure(memory: Sequence[BucketMemory]) -> str:
    """One row of columns an executor: filled is actual, dashed is predicted."""
    executors = list(dict.fromkeys(each.executor for each in memory))
    most = max(max(each.actual, each.predicted or 0) for each in memory) or 1
    tall, row = 92, 150
    parts = []
    for index, executor in enumerate(executors):
        mine = [each for each in memory if each.executor == executor]
        base = index * row + tall + 22
        parts.append(f"<text x='0' y='{base - tall / 2}'>{esc(executor)}</text>")
        parts.append(
            f"<line class='axis' x1='{LEFT}' x2='{WIDTH}' y1='{base + 0.5}' y2='{base + 0.5}'/>"
        )
        slot = min(150.0, (WIDTH - LEFT) / len(mine))
        for number, each in enumerate(mine):
            parts.append(_column(each, LEFT + number * slot, slot, base, tall / most))
    legend = row * len(executors) + 8
    parts.append(
        f"<rect class='graph' x='{LEFT}' y='{legend - 10}' width='16' height='11' rx='2'/>"
        f"<text class='soft' x='{LEFT + 22}' y='{legend}'>actual</text>"
        f"<rect class='predicted' x='{LEFT + 82}' y='{legend - 10}' width='16' height='11' rx='2'/>"
        f"<text class='soft' x='{LEFT + 104}' y='{legend}'>predicted</text>"
    )
    return _svg(legend + 8, "graph memory of each bucket", parts)


def _column(each: BucketMemory, x: float, slot: float, base: float, scale: float) -> str:
    middle, width = x + slot / 2, min(46.0, slot * 0.6)
    predicted = "not predicted" if each.predicted is None else f"predicted {size(each.predicted)}"
    tip = f"{each.executor} {each.phase}[{each.bucket}]\nactual {size(each.actual)}\n{predicted}"
    height = each.actual * scale
    made = (
        f"<rect class='part graph' x='{middle - width / 2:.1f}' y='{base - max(height, 1.5):.1f}' "
        f"width='{width:.1f}' height='{max(height, 1.5):.1f}' rx='2' data-tip='{esc(tip)}'/>"
    )
    top = height
    if each.predicted is not None:
        outline = each.predicted * scale
        top = max(top, outline)
        made += (
            f"<rect class='predicted' x='{middle - width / 2 - 3:.1f}' y='{base - outline:.1f}' "
            f"width='{width + 6:.1f}' height='{outline:.1f}' rx='2'/>"
        )
    anchor = f"x='{middle:.1f}' text-anchor='middle'"
    made += f"<text {anchor} y='{base - top - 5:.1f}'>{esc(size(each.actual))}</text>"
    return made + f"<text class='soft' {anchor} y='{base + 16}'>{each.phase} {each.bucket}</text>"


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f"<svg viewBox='0 0 {WIDTH} {height:.0f}' role='img' aria-label='{esc(label)}'>"
        f"{''.join(parts)}</svg>"
    )

"""Distributions of times as SVG: which share of requests has waited at most so long."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

PANELS = (("ttft", "first token"), ("itl", "between chunks"), ("e2el", "to the end"))
SIDE, GAP, LEFT, TOP, BOTTOM = 260, 60, 56, 78, 56
"""Of a panel, which is a square, and around it."""
POINTS = 200
"""Of a line."""
COLOURS = ("#2f6fb5", "#d98200", "#2a9d74", "#b5485d", "#7a5fb0", "#5f6b7a")
STYLE = (
    'text{font:12px system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif;fill:#1d2129}'
    ".title{font-size:17px;font-weight:600}.soft{fill:#626b78}"
)


def plot_distributions(record: dict[str, Any], times: Sequence[dict[str, list[float]]]) -> str:
    """A panel for each kind of time, a line for each rate.

    Args:
        record: Of :func:`reprise.bench.serve.serve`.
        times: What it gives beside.
    """
    width = LEFT + len(PANELS) * SIDE + (len(PANELS) - 1) * GAP + 24
    height = TOP + SIDE + BOTTOM
    title = f"{record['model']}: {record['num_prompts']} requests to {record['endpoint']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{LEFT}" y="26">{html.escape(title)}</text>',
    ]
    x = LEFT
    for number, result in enumerate(record["results"]):
        rate = result["request_rate"]
        name = "all at once" if rate is None else f"{rate:g} requests/s"
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{x}" y="40" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="46">{name}</text>')
        x += 30 + 7 * len(name)
    for number, (key, label) in enumerate(PANELS):
        left = LEFT + number * (SIDE + GAP)
        parts += _panel(left, label, [each[key] for each in times], number == 0)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, label: str, lines: Sequence[Sequence[float]], first: bool) -> list[str]:
    known = [max(value, 1e-3) for line in lines for value in line]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    end = max(end, begin + 1)

    def across(value: float) -> float:
        return left + SIDE * (math.log10(max(value, 1e-3)) - begin) / (end - begin)

    def up(share: float) -> float:
        return TOP + SIDE * (1 - share)

    parts = []
    for power in range(begin, end + 1):
        x = across(10.0**power)
        parts.append(f'<path d="M{x:.1f} {TOP}V{TOP + SIDE}" stroke="#e4e7ea"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{TOP + SIDE + 18}" text-anchor="middle">'
            f"{10.0**power:g}</text>"
        )
    for share in (0, 0.5, 0.9, 0.99, 1):
        y = up(share)
        parts.append(f'<path d="M{left} {y:.1f}H{left + SIDE}" stroke="#e4e7ea"/>')
        if first and share != 0.99:  # too near to the one above
            parts.append(
                f'<text class="soft" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{share:.0%}</text>"
            )
    for number, line in enumerate(lines):
        ordered = sorted(line)
        if not ordered:
            continue
        count = len(ordered)
        which = sorted({min(count - 1, n * count // POINTS) for n in range(POINTS + 1)})
        points = " ".join(f"{across(ordered[n]):.1f},{up((n + 1) / count):.1f}" for n in which)
        start = f"{across(ordered[0]):.1f},{up(0):.1f}"
        parts.append(
            f'<polyline points="{start} {points}" fill="none" '
            f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>'
        )
    middle = left + SIDE / 2
    parts.append(
        f'<text x="{middle}" y="{TOP + SIDE + 40}" text-anchor="middle">{label}, ms</text>'
    )
    return parts

"""Small helpers with which the page is written."""

from __future__ import annotations

import html
import itertools
import math

from reprise.doctor.graphs.report import MatrixCell, executor_of

RAMP = ((-1.0, (214, 184, 120)), (0.0, (240, 239, 233)), (1.0, (189, 215, 231)),
        (2.0, (107, 174, 214)), (3.0, (52, 120, 182)), (5.0, (10, 48, 104)))  # fmt: skip
"""Colours by the binary logarithm of the speed-up. Sand is slower, blue is faster; red means
wrong and nothing else."""

BUCKET_OF = {"decode": "requests", "mixed": "tokens"}
"""What the size of a bucket counts."""


def esc(value: object) -> str:
    """Text for HTML content and attributes."""
    return html.escape(str(value), quote=True)


def colour(speedup: float) -> tuple[str, str]:
    """Background and text colour of a cell."""
    place = min(max(math.log2(speedup), RAMP[0][0]), RAMP[-1][0])
    for (low, below), (high, above) in itertools.pairwise(RAMP):
        if place <= high:
            part = (place - low) / (high - low)
            rgb = [round(a + (b - a) * part) for a, b in zip(below, above, strict=True)]
            break
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140
    return f"rgb({rgb[0]} {rgb[1]} {rgb[2]})", "#14171c" if light else "#ffffff"


def ramp_gradient() -> str:
    """The legend's colours as a CSS gradient."""
    span = RAMP[-1][0] - RAMP[0][0]
    stops = [f"rgb({r} {g} {b}) {100 * (at - RAMP[0][0]) / span:.0f}%" for at, (r, g, b) in RAMP]
    return f"linear-gradient(to right, {', '.join(stops)})"


def short(number: int) -> str:
    """``2048`` as ``2K``."""
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else str(number)


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} ms" if value >= 0.1 else f"{value * 1000:.0f} µs"


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return "-"
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def times(speedup: float) -> str:
    """``2.0`` with a multiplication sign."""
    return f"{speedup:.{1 if speedup < 9.95 else 0}f}\u00d7"


def gap(value: float | None) -> str:
    """A largest difference."""
    if value is None:
        return "-"
    return "NaN (unwritten)" if math.isnan(value) else f"{value:.3g}"


def hint(cell: MatrixCell) -> str:
    """What a cell says when pointed at."""
    lines = [cell.name]
    if cell.bad:
        lines.append(f"WRONG: {cell.reason}")
        if cell.where is not None:
            lines.append(f"first divergence: {cell.where}")
            if cell.where.module:
                lines.append(f"module: {cell.where.module}")
        if not cell.captured:
            lines.append("not captured")
    elif executor_of(cell.executor) != "none":
        lines.append(
            "captured, verified bit by bit" if cell.largest_difference == 0 else "captured"
        )
    if cell.eager_ms is not None:
        lines.append(f"eager {milliseconds(cell.eager_ms)}")
    if cell.replay_ms is not None:
        lines.append(f"replay {milliseconds(cell.replay_ms)}")
    return "\n".join(lines)

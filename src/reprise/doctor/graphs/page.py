"""The graph matrix as one self-contained HTML page."""

from __future__ import annotations

import statistics
from importlib.resources import files
from pathlib import Path

from reprise.doctor.graphs.figures import memory_figure, timeline_figure
from reprise.doctor.graphs.kinds import kinds_section
from reprise.doctor.graphs.markup import (
    BUCKET_OF,
    colour,
    esc,
    gap,
    hint,
    milliseconds,
    ramp_gradient,
    short,
    size,
    times,
)
from reprise.doctor.graphs.report import GraphMatrix, MatrixCell, Timeline, executor_of, shown
from reprise.shape import PHASES, Phase


def write_page(matrix: GraphMatrix, path: Path) -> None:
    """Write the page; it loads nothing from anywhere."""
    path.write_text(render(matrix), encoding="utf-8")


def render(matrix: GraphMatrix) -> str:
    """The page's text."""
    parts = [
        _head(matrix),
        _verdict(matrix),
        _tiles(matrix),
        _heat_maps(matrix),
        kinds_section(matrix),
        _failures(matrix),
        _timelines(matrix),
        _memory(matrix),
        _foot(matrix),
    ]
    here = files("reprise.doctor.graphs")
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    title = esc(f"Graphs of {matrix.facts.get('model', 'a model')}")
    return (
        '<!doctype html>\n<html lang="en" data-theme="light">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(parts)}</main>\n<div id='tip' role='tooltip'></div>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _head(matrix: GraphMatrix) -> str:
    facts = matrix.facts
    shown = [facts.get(name) for name in ("device_name", "dtype", "date")]
    return (
        "<header><div><h1>Device graphs of "
        f"{esc(facts.get('model', 'a model'))}</h1>"
        f"<p class='facts'>{' · '.join(esc(each) for each in shown if each)}</p></div>"
        "<button id='theme' type='button'>light / dark</button></header>\n"
    )


def _verdict(matrix: GraphMatrix) -> str:
    graphs, bad, refused = matrix.graphs, matrix.bad, matrix.refused
    if bad or refused:
        ops = list(dict.fromkeys(str(e.where).split(", ")[0] for e in bad if e.where is not None))
        first = f" First divergence: <code>{esc(', '.join(ops[:3]))}</code>." if ops else ""
        text = f"<strong>{len(bad)} of {len(graphs)} cells are wrong.</strong>{first}"
        if refused:
            names = ", ".join(each.name.removesuffix(" at start-up") for each in refused)
            text += f" Start-up refuses {'further ' if bad else ''}graphs: {esc(names)}."
        text = f"<div class='verdict wrong'><span class='mark'>✗</span><div>{text}</div></div>\n"
    else:
        text = (
            f"<div class='verdict ok'><span class='mark'>✓</span><div><strong>All {len(graphs)} "
            "cells replay exactly what eager execution computes.</strong></div></div>\n"
        )
    if matrix.fault is not None:
        text += (
            f"<div class='injected'>Fault injected on purpose: <b>{esc(matrix.fault['name'])}</b> "
            f"in <code>{esc(matrix.fault['op'])}</code>: {esc(matrix.fault['summary'])}.</div>\n"
        )
    return text


def _tiles(matrix: GraphMatrix) -> str:
    faster = [each.speedup for each in matrix.cells if each.speedup is not None]
    verified = sum(each.verified for each in matrix.cells)
    memory: dict[str, int] = {}
    for each in matrix.memory:
        memory[each.executor] = memory.get(each.executor, 0) + each.actual
    tiles = [(f"{verified} / {len(matrix.graphs)}", "cells verified")]
    if faster:
        tiles.append((times(statistics.median(faster)), "median speed-up"))
        certain = [each.speedup for each in matrix.cells if each.sure and each.speedup is not None]
        if certain:
            tiles.append((times(max(certain)), "largest speed-up"))
    tiles += [(size(taken), f"graph memory, {name}") for name, taken in memory.items()]
    made = [f"<div class='tile'><b>{esc(b)}</b><span>{esc(s)}</span></div>" for b, s in tiles]
    return f"<div class='tiles'>{''.join(made)}</div>\n"


# ---- the heat map ----------------------------------------------------------------------------


def _heat_maps(matrix: GraphMatrix) -> str:
    text = (
        "<h2>Executor &times; bucket &times; context</h2>\n<p class='soft'>A row is a bucket, a "
        "column the tokens of the step's longest request. The number is eager time divided by "
        "replay time; point at it for the rest.</p>\n"
    )
    for phase in PHASES:
        if not matrix.buckets[phase]:
            continue
        panels = [_panel(matrix, executor, phase) for executor in matrix.rows(phase)]
        text += f"<div class='panels'>{''.join(panels)}</div>\n"
    return text + (
        "<div class='legend'>"
        f"<span>&frac12;&times; (slower) <i class='ramp' style='background:{ramp_gradient()};"
        "margin:0 6px'></i> 32&times; (faster than eager)</span>"
        "<span><i style='background:repeating-linear-gradient(45deg,#c8102e 0 7px,#9d0c24 7px "
        "14px)'></i>✗ wrong or not captured</span>"
        "<span><i style='background:var(--absent)'></i>eager, or not to be had here</span>"
        "</div>\n"
    )


def _panel(matrix: GraphMatrix, executor: str, phase: Phase) -> str:
    label = shown(executor)
    reason = next(
        (e.reason for e in matrix.absent if (e.executor, e.phase) == (executor, phase)), None
    )
    heads = "".join(f"<th scope='col'>{short(each)}</th>" for each in matrix.contexts)
    rows = ""
    for bucket in matrix.buckets[phase]:
        cells = [matrix.cell(executor, phase, bucket, each) for each in matrix.contexts]
        rows += f"<tr><th scope='row'>{short(bucket)}</th>"
        rows += "".join(_cell(each, matrix, reason) for each in cells) + "</tr>"
    note = f"<p class='soft corner'>not here: {esc(reason)}</p>" if reason else ""
    return (
        f"<section class='card panel'><h3>{esc(label)} <span class='soft'>{phase}</span></h3>"
        f"<table><thead><tr><th class='corner'>{BUCKET_OF[phase]}</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{note}</section>"
    )


def _cell(cell: MatrixCell | None, matrix: GraphMatrix, reason: str | None) -> str:
    if cell is None:
        return f"<td class='absent' data-tip='{esc(reason or 'not measured')}'>&ndash;</td>"
    tip = f"data-tip='{esc(hint(cell))}'"
    if cell.bad:
        target = f"#wrong-{matrix.bad.index(cell)}"
        return f"<td class='broken' {tip}><a href='{target}' aria-label='wrong'>✗</a></td>"
    if cell.speedup is None:
        return f"<td class='eager' {tip}>{esc(_brief(cell.eager_ms))}</td>"
    back, ink = colour(cell.speedup if cell.sure else 1.0)
    style = f"background:{back};color:{ink}"
    return f"<td style='{style}' {tip} tabindex='0'>{esc(times(cell.speedup))}</td>"


def _brief(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f}ms" if ms < 100 else f"{ms:.0f}ms"


# ---- what is wrong ---------------------------------------------------------------------------


def _failures(matrix: GraphMatrix) -> str:
    if matrix.ok:
        return ""
    heads = ("cell", "layer", "op", "tensor", "segment", "largest difference", "reason")
    rows = ""
    for index, each in enumerate(matrix.failures):
        where = each.where
        layer, op, tensor, segment = "-", "-", each.tensor or "-", "-"
        if where is not None:
            layer = f"layer {where.layer}" if where.layer is not None else where.module or "-"
            op = f"{where.op} #{where.call}"
            if where.tensor and not where.produced:
                tensor += f" (wrong before the op; right after {where.after or 'the start'})"
            segment = "-" if where.segment is None else str(where.segment)
        module = f" title='{esc(where.module)}'" if where is not None else ""
        rows += (
            f"<tr id='wrong-{index}' class='failure'><td class='name'>{esc(each.name)}</td>"
            f"<td class='layer'{module}>{esc(layer)}</td><td class='op'><code>{esc(op)}</code></td>"
            f"<td class='tensor'><code>{esc(tensor)}</code></td><td>{esc(segment)}</td>"
            f"<td>{esc(gap(each.difference))}</td><td>{esc(each.reason)}</td></tr>"
        )
    head = "".join(f"<th>{each}</th>" for each in heads)
    return (
        "<h2 id='wrong'>What is wrong</h2>\n<p class='soft'>The first op, in the order of the "
        "forward pass, at which replay left the path of eager execution. Where the results are "
        "right and other memory was changed, the tensor and its block or parameter.</p>\n"
        f"<div class='card'><table class='list'><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


# ---- figures ---------------------------------------------------------------------------------


def _timelines(matrix: GraphMatrix) -> str:
    text = ""
    for phase in PHASES:
        lines = [each for each in matrix.timelines if each.phase == phase]
        if lines:
            first = lines[0]
            text += (
                f"<div class='card' style='margin-top:10px'><h3>{phase} step "
                f"<span class='soft'>bucket of {first.bucket} {BUCKET_OF[phase]}, longest context "
                f"{first.context} tokens</span></h3>{timeline_figure(lines)}"
                f"{_enlarged(lines)}</div>\n"
            )
    if not text:
        return ""
    return (
        "<h2>One step, part by part</h2>\n<p class='soft'>Measured one part at a time. The number "
        "on the right is the whole step, timed without stops.</p>\n"
        f"{text}<div class='legend'><span><i style='background:var(--graph)'></i>graph segment"
        "</span><span><i style='background:var(--break)'></i>break op, run eagerly</span>"
        "<span><i style='background:var(--op)'></i>op of eager execution</span>"
        "<span><i style='background:var(--rest)'></i>between ops</span></div>\n"
    )


def _enlarged(lines: list[Timeline]) -> str:
    """The graphs once more on a time axis of their own, where eager execution dwarfs them."""
    graphs = [each for each in lines if executor_of(each.executor) != "none"]
    longest = max((each.bar_ms for each in lines), default=0)
    if not graphs or 2 * max(each.bar_ms for each in graphs) > longest:
        return ""
    return (
        "<p class='soft' style='margin:10px 0 0'>The graphs alone, enlarged:</p>"
        f"{timeline_figure(graphs)}"
    )


def _memory(matrix: GraphMatrix) -> str:
    if not matrix.memory:
        return ""
    note = f" Prediction: {esc(matrix.memory_note)}." if matrix.memory_note else ""
    return (
        "<h2>Graph memory by bucket</h2>\n<p class='soft'>What each capture added to the shared "
        f"pool, in the order of capture: the largest bucket comes first and pays for the rest."
        f"{note}</p>\n<div class='card'>{memory_figure(matrix.memory)}</div>\n"
    )


def _foot(matrix: GraphMatrix) -> str:
    notes = "".join(f"<p>{esc(each)}</p>" for each in matrix.notes)
    versions = matrix.facts.get("versions", {})
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    command = matrix.facts.get("command")
    made = f"<p>Made with <code>{esc(command)}</code></p>" if command else ""
    slowest = max((each.eager_ms or 0 for each in matrix.cells), default=0)
    return (
        f"<footer>{notes}{made}<p>{esc(known)}; slowest step {milliseconds(slowest)}</p></footer>\n"
    )

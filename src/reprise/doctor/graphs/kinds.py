"""The kinds matrix of the page: facts of steps by graph, and how each was proven."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from reprise.doctor.graphs.markup import BUCKET_OF, esc, short
from reprise.doctor.graphs.proof import met
from reprise.doctor.graphs.report import GraphMatrix, Proof
from reprise.shape import PHASES, Phase

MARKS = {
    "start": "●", "family": "◐", "live": "◆", "not yet met": "·", "refused": "✗", "not used": "-",
}  # fmt: skip
MEANINGS = {
    "start": "proven at start on this graph",
    "family": "proven on the smallest, a middle and the largest graph of its family",
    "live": "proven on a live step",
    "not yet met": "not yet met: the first such step is compared, or runs eagerly",
    "refused": "graph refused",
    "not used": "gains nothing over eager execution and is left out",
}


def kinds_section(matrix: GraphMatrix) -> str:
    """A table a phase, and the legend."""
    text = ""
    for phase in PHASES:
        mine = [each for each in matrix.proofs if each.phase == phase]
        if mine:
            text += _table(phase, mine)
    if not text:
        return ""
    legend = "".join(
        f"<span><b class='fact {_css(state)}'>{mark}</b>{esc(MEANINGS[state])}</span>"
        for state, mark in MARKS.items()
    )
    return (
        "<h2>Kinds of steps that start-up proves</h2>\n<p class='soft'>A row is a fact about a "
        "step or about one of its requests, a column a graph. A graph is replayed unseen only in "
        "steps of which every fact, and every pair of facts, was proven on it. Point at a mark for "
        f"its meaning.</p>\n<div class='kinds'>{text}</div><div class='legend'>{legend}</div>\n"
    )


def _table(phase: Phase, proofs: Sequence[Proof]) -> str:
    executors = [
        (name, list(group)) for name, group in itertools.groupby(proofs, lambda e: e.executor)
    ]
    columns = [each for _, group in executors for each in group]
    groups = "".join(
        f"<th colspan='{len(group)}' class='edge'>{esc(name)}</th>" for name, group in executors
    )
    edges = {id(group[0]) for _, group in executors}
    buckets = "".join(
        f"<th scope='col'{_edge(each, edges)}>{short(each.bucket)}</th>" for each in columns
    )
    known, unknown = met(proofs)
    rows = ""
    for attribute, names in itertools.groupby(known, lambda name: name.split(": ")[0]):
        mine = list(names)
        for index, name in enumerate(mine):
            head = (
                f"<th rowspan='{len(mine)}' class='of'>{esc(attribute)}</th>" if not index else ""
            )
            first = " class='first'" if not index else ""
            cells = "".join(_cell(each, name, edges) for each in columns)
            value = name.split(": ", 1)[1]
            rows += f"<tr{first}>{head}<th scope='row'>{esc(value)}</th>{cells}</tr>"
    if not known:  # every graph was refused
        cells = "".join(_cell(each, "any", edges) for each in columns)
        rows = f"<tr class='first'><th colspan='2'>any</th>{cells}</tr>"
    for label, numbers in (
        ("probes matched", [f"{each.probes}/{each.planned_probes}" for each in columns]),
        ("facts and pairs", [str(each.pairs) for each in columns]),
    ):
        shown = "".join(
            f"<td class='sum{' edge' if id(each) in edges else ''}' "
            f"data-tip='{esc(_summary(each))}'>{'-' if each.reason else cell}</td>"
            for each, cell in zip(columns, numbers, strict=True)
        )
        rows += f"<tr class='first'><th colspan='2'>{label}</th>{shown}</tr>"
    note = (
        f"<p class='soft corner'>Not yet met by any of these graphs: {esc('; '.join(unknown))}.</p>"
        if unknown
        else ""
    )
    return (
        f"<section class='card'><h3>{phase} <span class='soft'>graphs by {BUCKET_OF[phase]}</span>"
        f"</h3><table class='facts-of'><thead><tr><th colspan='2'></th>{groups}</tr><tr>"
        f"<th colspan='2'></th>{buckets}</tr></thead><tbody>{rows}</tbody></table>{note}</section>"
    )


def _cell(proof: Proof, fact: str, edges: set[int]) -> str:
    state = proof.state(fact)
    tip = f"{_summary(proof)}\n{fact}: {MEANINGS[state]}"
    edge = " edge" if id(proof) in edges else ""
    return (
        f"<td class='{edge.strip()}' data-tip='{esc(tip)}'>"
        f"<b class='fact {_css(state)}'>{MARKS[state]}</b></td>"
    )


def _summary(proof: Proof) -> str:
    about = f": {proof.reason}" if proof.reason else ""
    return f"{proof.executor} {proof.phase}[{proof.bucket}], {proof.verdict}{about}"


def _edge(proof: Proof, edges: set[int]) -> str:
    return " class='edge'" if id(proof) in edges else ""


def _css(state: str) -> str:
    return state.replace(" ", "-")

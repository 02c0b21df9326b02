"""How far start-up's verification proves each graph, fact by fact."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.doctor.graphs.places import Places
from reprise.doctor.graphs.report import PROVEN, Proof, executor_of
from reprise.graphs import GraphInfo


def proof_of(executor: str, info: GraphInfo, places: Places) -> Proof:
    """What verification found out about a graph of ``executor``, as the matrix calls it, whatever
    runs instead of it."""
    made = Proof(
        executor, info.phase, info.bucket, info.proof, info.probes, info.planned_probes, info.pairs
    )
    if info.quarantined is not None:
        reason = refusal(executor, info)
        made = Proof(executor, info.phase, info.bucket, "refused", 0, 0, 0, reason=reason)
        made.where = places.in_text(reason)
    elif info.dropped is not None:
        made = Proof(executor, info.phase, info.bucket, "not used", 0, 0, 0, reason=info.dropped)
    elif info.deferred is not None:
        made = Proof(executor, info.phase, info.bucket, info.proof, 0, 0, 0, reason=info.deferred)
    else:
        made.facts = dict(info.facts)
    return made


def refusal(executor: str, info: GraphInfo) -> str:
    """Why the graph of this executor was refused, without what happened to those that followed."""
    reason = info.quarantined or "nothing was captured"
    return reason.split("; then ")[0].removeprefix(f"{executor_of(executor)}: ")


def met(proofs: Sequence[Proof]) -> tuple[list[str], list[str]]:
    """The facts that some graph has been proven on, and those that none has."""
    names = list(dict.fromkeys(name for each in proofs for name in each.facts))
    known = [name for name in names if any(each.state(name) in PROVEN for each in proofs)]
    return known, [name for name in names if name not in known]

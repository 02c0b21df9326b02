"""Inputs that no probe changes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from reprise.graphs.capture import BucketGraph, Capturer
from reprise.graphs.compare import same_bits
from reprise.graphs.contract import Computation
from reprise.graphs.trust import Ledger

logger = logging.getLogger(__name__)


def blind_inputs(
    computation: Computation, capturer: Capturer, ledger: Ledger, buckets: Sequence[BucketGraph]
) -> list[str]:
    """Inputs to which no probe of the phase's first graph gives a new value. Then the phase's
    probes have proven nothing: perhaps they have not arrived, and were all the same step."""
    blind: list[str] = []
    phases: dict[str, bool] = {}
    for bucket in buckets:
        if bucket.shape.phase in phases or bucket.graph is None:
            continue
        capturer.empty_inputs(bucket.shape)
        inputs = computation.inputs(bucket.shape)
        before = {name: each.clone() for name, each in inputs.items()}
        unchanged = set(before)
        for probe in bucket.probes:
            if not unchanged:
                break
            with contextlib.suppress(Exception):  # one that time did not allow before
                probe.fill()
            unchanged -= {n for n in unchanged if not same_bits(before[n], inputs[n])}
        phases[bucket.shape.phase] = bool(unchanged)
        blind += [f"{bucket.shape.phase}: {name}" for name in before if name in unchanged]
    if blind:
        logger.warning(
            "graph probes change no value of: %s; graphs of these phases are not proven, and "
            "live steps are compared or run eagerly", ", ".join(blind),
        )  # fmt: skip
    for bucket in buckets:
        if bucket.graph is not None and phases[bucket.shape.phase]:
            ledger.enter(bucket.key, bucket.family)
            bucket.info.verified, bucket.info.probes = False, 0
    return blind

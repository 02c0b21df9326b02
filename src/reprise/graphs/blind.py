"""Inputs that no probe changes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence

from reprise.graphs.capture import BucketGraph
from reprise.graphs.compare import same_bits
from reprise.graphs.contract import Computation
from reprise.graphs.padding import write_padding
from reprise.graphs.trust import Ledger
from reprise.shape import Phase

logger = logging.getLogger(__name__)


def blind_inputs(
    computation: Computation, ledger: Ledger, buckets: Sequence[BucketGraph]
) -> dict[Phase, list[str]]:
    """By phase the inputs to which no probe of its first graph gives a new value. If there are any,
    its probes prove nothing: perhaps they have not arrived, and were all the same step."""
    blind: dict[Phase, list[str]] = {}
    for bucket in buckets:
        if bucket.shape.phase in blind or bucket.graph is None:
            continue
        write_padding(computation, bucket.shape)
        inputs = computation.inputs(bucket.shape)
        before = {name: each.clone() for name, each in inputs.items()}
        unchanged = set(before)
        for probe in bucket.probes:
            if not unchanged:
                break
            with contextlib.suppress(Exception):  # one that time did not allow before
                probe.fill()
            unchanged -= {n for n in unchanged if not same_bits(before[n], inputs[n])}
        blind[bucket.shape.phase] = [name for name in before if name in unchanged]
    if any(blind.values()):
        logger.warning(
            "graph probes change no value of: %s; graphs of these phases are not proven, and "
            "live steps are compared or run eagerly", ", ".join(told(blind)),
        )  # fmt: skip
    for bucket in buckets:
        if bucket.graph is not None and blind[bucket.shape.phase]:
            ledger.enter(bucket.key, bucket.family)
            bucket.info.verified, bucket.info.probes = False, 0
    return blind


def told(blind: Mapping[Phase, Sequence[str]]) -> list[str]:
    """``decode: slots``, of each input."""
    return [f"{phase}: {name}" for phase, names in blind.items() for name in names]

"""Weights that a graph has changed, loaded again."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from reprise.errors import WeightsLostError, describe
from reprise.graphs.contract import Computation
from reprise.graphs.guard import Guard

logger = logging.getLogger(__name__)


def mend(computation: Computation, guard: Guard, wrong: Sequence[str] | None = None) -> None:
    """Load damaged weights again.

    Args:
        computation: Whose weights.
        guard: Knows what they were.
        wrong: Their names; None: find out.

    Raises:
        WeightsLostError: They are not what they were when they were loaded first.
    """
    found = guard.wrong_weights() if wrong is None else wrong
    if not found:
        return
    reason, still = "they are wrong after it", found
    try:
        computation.mend(found)
        still = guard.wrong_weights()
    except Exception as error:
        reason = describe(error)
    if still:
        raise WeightsLostError(
            f"a graph has changed {', '.join(still)} and loading them again did not help "
            f"({reason}): start the engine anew, with graph_mode='none' if it happens again"
        )
    logger.warning("loaded again, since a graph had changed them: %s", ", ".join(found))

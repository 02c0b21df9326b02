"""What is computed again when a graph was wrong, or its replay raised."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from reprise.engine.scheduler import Scheduler
from reprise.engine.structured import Grammars
from reprise.engine.suspects import Suspects
from reprise.errors import GraphReplayError
from reprise.graphs import Damage
from reprise.request import Request
from reprise.runner import ModelRunner
from reprise.step import Step

logger = logging.getLogger(__name__)


class Recovery:
    """Has requests computed again that a graph may have spoiled, and says which tokens are suspect.

    Tokens that callers have got cannot be taken back, keys and values can.

    Args:
        runner: Whose graphs they are.
        scheduler: Of the requests.
        grammars: Whose masks the device has.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, grammars: Grammars) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._grammars = grammars
        self._suspects = {
            owner: Suspects() for owner, graphs in runner.owners if graphs.plan.captures
        }
        """The owner of the graphs."""
        self._failed_replays = 0
        """Since the last step that succeeded."""

    def submitted(self, step: Step, requests: Sequence[Request]) -> None:
        """A step was submitted: remember which graphs drew its tokens unseen, and see to those that
        its canaries have found wrong."""
        for owner, graphs in self._runner.owners:
            if owner in self._suspects:
                self._suspects[owner].note(step, requests, graphs.ran)
        self.heed_canaries()

    def succeeded(self) -> None:
        """A step has brought its results."""
        self._failed_replays = 0

    def heed_canaries(self) -> None:
        """Compute again what graphs have spoiled that were found wrong."""
        for owner, damage in self._runner.owners.take_damages():
            self._heed(owner, damage)

    def replay_failed(self, error: GraphReplayError) -> None:
        """Have running requests computed again. The steps under way are lost, and all that they
        may have spoiled.

        Raises:
            GraphReplayError: Replays fail more often than there are graphs.
        """
        self._failed_replays += 1
        if self._failed_replays > self._runner.owners.num_graphs:
            raise error  # each refuses one graph, so something else is wrong
        count = self._scheduler.drop_steps()
        self._runner.forget_steps()
        self._runner.platform.synchronize()
        logger.warning("%s; %d running request(s) are computed again without it", error, count)

    def _heed(self, owner: str, damage: Damage) -> None:
        """The graph's replays since it was last found right may have been wrong too."""
        if self._runner.harmless(owner, damage):
            logger.warning(
                "graph %s drafted wrong tokens, or wrong keys and values of drafts: fewer drafts "
                "counted than should have, and no token is wrong", damage.name,
            )  # fmt: skip
            return
        suspect = self._suspects[owner].accuse(damage.graph)
        if suspect:
            logger.warning(
                "%d token(s) that callers may have were drawn from graph %s since it was last "
                "found right: see suspect_from of their outputs",
                suspect,
                damage.name,
            )
        if damage.earlier:
            self._runner.forget_draws()
            self._grammars.send_masks_again()
            count = self._scheduler.recompute()
            logger.warning(
                "graph %s was wrong: cached prefixes are forgotten and %d running request(s) "
                "computed again, for it may have written what they read",
                damage.name,
                count,
            )
        elif damage.units:
            owners = self._scheduler.recompute_owners(damage.units)
            logger.warning(
                "graph %s has written %s, which its step did not own: what the cache had "
                "of them is forgotten, and computed again for %s",
                damage.name,
                ", ".join(f"{unit} {index}" for unit, index in sorted(damage.units)),
                ", ".join(owners) or "no running request",
            )

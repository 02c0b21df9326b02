"""The model's weights, as far as callers replace them."""

from __future__ import annotations

from reprise.engine.scheduler import Scheduler
from reprise.errors import LoadError, RequestError, WeightsLostError
from reprise.loading import NamedTensors, plan_update, update_weights
from reprise.runner import ModelRunner


class Weights:
    """Replaces weights in place, and knows whether that was interrupted.

    Args:
        runner: Whose model it is.
        scheduler: Of the cached prefixes.
        alone: No other rank or engine computes with this one.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, alone: bool) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._alone = alone
        self._half_updated: set[str] = set()
        """Names of those that may be neither old nor new."""
        self._lost: str | None = None
        """What a graph has changed, and why it could not be loaded again."""

    @property
    def whole(self) -> bool:
        """Whether all weights are old, or all new, and as they were loaded."""
        return not self._half_updated and self._lost is None

    def lose(self, error: WeightsLostError) -> None:
        """A graph has changed some, for good: nothing may be computed with them, eagerly least of
        all, since that is not compared with anything."""
        self._lost = str(error)

    def check(self) -> None:
        """Refuse to compute with weights that are half replaced, or lost.

        Raises:
            LoadError: They are half replaced.
            WeightsLostError: They are lost.
        """
        if self._lost is not None:
            raise WeightsLostError(self._lost)
        if self._half_updated:
            raise LoadError(
                f"update_weights was interrupted: {', '.join(sorted(self._half_updated))} may be "
                "half replaced; call it again with them"
            )

    def update(self, weights: NamedTensors) -> None:
        """Replace values of the model's parameters, and forget all cached prefixes. No request may
        be unfinished.

        Raises:
            RequestError: Several ranks or engines have the model.
            LoadError: As of :meth:`reprise.engine.Engine.update_weights`.
            WeightsLostError: Others than these may be wrong.
        """
        platform = self._runner.platform
        platform.activate()
        if not self._alone:
            raise RequestError(
                "update_weights where several ranks compute one model (tensor_parallel_size, "
                "enable_expert_parallel) is not supported: create a new engine"
            )
        if self._lost is not None:
            raise WeightsLostError(self._lost)
        copies = plan_update(self._runner.model, weights)
        if not self._half_updated:  # else they differ on purpose
            try:
                self._runner.settle_weights()
            except WeightsLostError as error:
                self.lose(error)
                raise
        self._scheduler.reset_prefix_cache()
        self._half_updated |= copies.keys()
        update_weights(copies, platform)
        self._half_updated -= copies.keys()
        self._runner.weights_replaced()

"""Steps that the device was given, and whose results the requests have not got."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from reprise.engine.structured import Grammars
from reprise.request import Request
from reprise.runner import ModelRunner, PendingOutput, StepOutput
from reprise.shape import StepShape
from reprise.step import Masks, Step


@dataclass(slots=True, eq=False)
class SubmittedStep:
    """A step, its requests, and its results once they were waited for."""

    step: Step
    requests: Sequence[Request]
    pending: PendingOutput
    unseen: str | None
    """The graph that computed it and that nothing was compared with, by name."""
    output: StepOutput | None = None


class Pipeline:
    """Gives steps to the device, one or more ahead of their results, which come in their order.

    Args:
        runner: Computes them.
        grammars: What may be drawn, of requests whose text has a form.
        depth: Most steps under way; with two, the next is prepared while the device computes.
    """

    def __init__(self, runner: ModelRunner, grammars: Grammars, depth: int) -> None:
        self._runner = runner
        self._grammars = grammars
        self.depth = depth
        self.steps: deque[SubmittedStep] = deque()
        """Oldest first. For reading."""
        self.wait_seconds = 0.0
        """Time spent waiting for the device, from the start; the rest is the host's."""

    def submit(self, step: Step, requests: Sequence[Request], *at_least: StepShape) -> None:
        """Start a step.

        Args:
            step: What to compute.
            requests: Those of the step.
            at_least: As of :meth:`reprise.runner.ModelRunner.submit`, where others compute too.
        """
        with self._runner.active():
            self._runner.submit(step, *at_least)
            unseen = self._runner.graphs.unseen
            # Grammars follow the tokens before the step's while the device computes it.
            masks = self._masks(step, requests)
            pending = self._runner.sample(step, masks)
            self.steps.append(SubmittedStep(step, requests, pending, unseen))

    def oldest(self) -> tuple[SubmittedStep, StepOutput]:
        """The oldest step and its results, waited for; it is under way no more.

        Raises:
            IndexError: There is none.
        """
        output = self._output_of(self.steps[0])
        return self.steps.popleft(), output

    def clear(self) -> None:
        """Forget all steps, whose results are lost."""
        self.steps.clear()
        self._grammars.steps_lost()

    def _masks(self, step: Step, requests: Sequence[Request]) -> Masks | None:
        """Which tokens may be drawn in the step that was submitted last. Only if one of its
        requests has a grammar does this wait for the tokens of the steps before it."""
        if not self._grammars.count or not self._grammars.concern(step, requests):
            return None
        for each in self.steps:
            self._output_of(each)
        return self._grammars.masks(step, requests)

    def _output_of(self, each: SubmittedStep) -> StepOutput:
        if each.output is None:
            began = time.perf_counter()
            each.output = each.pending.wait()
            self.wait_seconds += time.perf_counter() - began
            if self._grammars.count and each.requests:
                self._grammars.take(each.requests, each.output)
        return each.output

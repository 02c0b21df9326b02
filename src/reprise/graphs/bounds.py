"""How much a graph may differ from eager execution where that does not repeat itself to the bit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from reprise.graphs.capture import BucketGraph
from reprise.graphs.compare import Coded, Compared, copies, relative_difference
from reprise.graphs.contract import Computation
from reprise.graphs.padding import compute_padding
from reprise.graphs.plan import Executor
from reprise.graphs.regions import owned
from reprise.graphs.step_memory import coded
from reprise.shape import StepShape

logger = logging.getLogger(__name__)

NOISE_FACTOR = 8
"""An inexact graph may differ from eager execution by so many times what eager execution differs
from itself."""


class Bounds:
    """Measured once, at start.

    Args:
        computation: Whose graphs are compared.
        error: None if all ops in use are exact; else the largest declared relative error.
    """

    def __init__(self, computation: Computation, error: float | None) -> None:
        self._computation = computation
        self._error = error
        self.measured: dict[Executor, float] = {}
        """Of executors whose graphs are not exact: the allowed difference, relative to the largest
        magnitude of a row."""

    @property
    def inexact(self) -> float | None:
        """The bound where eager execution does not repeat itself; None: it does, to the bit."""
        return None if self._error is None else self.measured.get("none", self._error)

    def of(self, executor: Executor) -> float | None:
        """How much a graph may differ from the model as written; None: by no bit."""
        found = self.measured.get(executor)
        return self.inexact if found is None else max(found, self.inexact or 0.0)

    def measure(self, buckets: Sequence[BucketGraph]) -> None:
        """Measure the bounds on what eager execution does, so that a wrong graph cannot widen its
        own bound."""
        first = next((each for each in buckets if each.graph is not None and each.probes), None)
        if first is None:
            return
        executors = {each.info.executor for each in buckets}
        smallest = torch.finfo(_output_dtype(self._computation, first)).eps
        if self._error is not None:
            noise = self._noise(buckets, jitter=False)
            self.measured["none"] = min(self._error, max(NOISE_FACTOR * noise, 4 * smallest))
            logger.info(
                "graphs: ops in use are inexact; two eager runs differ by %.2g of a row's largest "
                "value, a graph may differ by %.2g", noise, self.measured["none"],
            )  # fmt: skip
        if "compiled" in executors:
            noise = self._noise(buckets, jitter=True)
            limit = float(smallest**0.5)
            self.measured["compiled"] = min(limit, max(2 * NOISE_FACTOR * noise, 16 * smallest))
            logger.info(
                "graphs: compiled code rounds in other places; one unit in the last place of each "
                "norm's weights makes %.2g of a row's largest value, a graph may differ by %.2g",
                noise, self.measured["compiled"],
            )  # fmt: skip

    def _noise(self, buckets: Sequence[BucketGraph], *, jitter: bool) -> float:
        """The largest relative difference of two eager runs, over the first probe of some buckets.

        Args:
            jitter: Between the runs, change every vector among the weights by one unit in the last
                place up or down: what other roundings would do.
        """
        probed = [each for each in buckets if each.probes]
        largest = 0.0
        for bucket in {each.key: each for each in (probed[0], probed[-1])}.values():
            bucket.probes[0].fill()
            first = self._results(bucket.shape, bucket.probes[0].live)
            vectors = [
                each
                for each in owned(self._computation.memory(), "weight").values()
                if each.dim() == 1 and each.is_floating_point()
            ]
            kept = [each.clone() for each in vectors]
            if jitter:
                for number, each in enumerate(vectors):
                    each.mul_(1 + _signs(each, number) * torch.finfo(each.dtype).eps)
            second = self._results(bucket.shape, bucket.probes[0].live)
            for each, value in zip(vectors, kept, strict=True):
                each.copy_(value)
            for name, result in first.items():
                if isinstance(result, Coded) or result.is_floating_point():
                    largest = max(largest, relative_difference(result, second[name]))
            # The graph's first replay on this probe is not to find what eager execution has left.
            compute_padding(self._computation, bucket.shape)
        return largest

    def _results(self, bucket: StepShape, live: StepShape) -> dict[str, Compared]:
        state = self._computation.state(bucket)
        before = state.read()
        self._computation.forward(bucket, self._computation.model)
        written = {name: each[:, : state.live(name, live)] for name, each in state.read().items()}
        results = {**coded(state, written), **copies(self._computation.outputs(live))}
        state.write(before)
        return results


def _output_dtype(computation: Computation, bucket: BucketGraph) -> torch.dtype:
    """Of its numbers: of an output, or where all of them are token ids, of a weight."""
    outputs = computation.outputs(bucket.shape).values()
    weights = owned(computation.memory(), "weight").values()
    return next(each.dtype for each in (*outputs, *weights) if each.is_floating_point())


def _signs(vector: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, vector.shape, generator=generator) * 2 - 1
    return signs.to(vector.device, vector.dtype)

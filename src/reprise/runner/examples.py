"""Made-up steps, computed before the first one: to compile kernels, and to measure memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable

from torch import Tensor

from reprise import ops
from reprise.config import EngineConfig
from reprise.distributed import Group
from reprise.errors import ModelError, describe
from reprise.graphs import Guard, parse_verify
from reprise.graphs.padding import compute_padding
from reprise.layers import CausalLM
from reprise.ops import OpTable
from reprise.ops.ahead import Ahead, called, compiling_ahead
from reprise.ops.rehearsal import rehearsal
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts import Drafter
from reprise.runner.forward_pass import ForwardPass
from reprise.runner.sampler import example_draws
from reprise.shape import StepShape

logger = logging.getLogger(__name__)


class Examples:
    """A few steps that call whatever a runner ever calls. Their inputs are padding.

    Args:
        config: Options.
        table: The ops in use.
        platform: The device.
        model: The target.
        forward_pass: The target's.
        buffers: Of the target's inputs.
        drafter: Of an engine that drafts.
        max_tokens: Most tokens in a step.
        group: The ranks that share the model.
    """

    def __init__(
        self,
        config: EngineConfig,
        table: OpTable,
        platform: Platform,
        model: CausalLM,
        forward_pass: ForwardPass,
        buffers: StepBuffers,
        drafter: Drafter | None,
        max_tokens: int,
        group: Group,
    ) -> None:
        self._config = config
        self._ops = table
        self._platform = platform
        self._forward_pass = forward_pass
        self._model = model
        self._buffers = buffers
        self._drafter = drafter
        self._max_tokens = max_tokens
        self._group = group

    def compiling_kernels(self) -> contextlib.AbstractContextManager[Ahead]:
        """Have every kernel compiled, side by side. In the ``with`` block those that take longest
        may be missing still: until :meth:`Ahead.ready` is called those of the smallest step, which
        no other needs, and those of draws, since what else a start does draws nothing."""
        return compiling_ahead(
            self._ops, [self._rest, *self._passes()], [self._smallest(), [self._draws]],
            self._group.rank, self._group.size,
        )  # fmt: skip

    def refuse_what_varies(self) -> None:
        """Raise a ModelError if the model calls what has no batch-invariant implementation."""
        passes = [*self._passes(), *self._smallest(), self._rest, self._draws]
        chosen, reasons = called(self._ops, passes)
        if reasons:
            raise ModelError(
                f"batch_invariant=True: this model needs ops that have no batch-invariant "
                f"implementation on {self._platform.name}: {', '.join(reasons)}; leave the option "
                "out ('reprise doctor ops' shows which ops have one)"
            )
        logger.info(
            "batch_invariant: bits of a row depend on no other, in all ops of the model: %s",
            "; ".join(f"{name} computes {', '.join(ops)}" for name, ops in chosen.items()),
        )

    def _passes(self) -> list[Callable[[], Tensor]]:
        """Kernels differ by phase and by the magnitude of a step, so a few shapes need them all."""
        most = self._config.max_num_seqs

        def mixed(tokens: int) -> StepShape:
            return StepShape.mixed(min(self._max_tokens, tokens), min(most, 8))

        sizes = sorted({min(n, most) for n in (128, 256, 1024, most)})
        between = [n for n in (2, 4, 8, 16, 32) if n < most]
        return [
            lambda: self._model.logits(self._run(mixed(64))[:1]),
            lambda: ops.argmax(self._run(*self._decode(sizes))),
            # What these have of their own is little, and is compiled together.
            lambda: self._run(*self._decode(between), mixed(16)),
            lambda: self._run(mixed(128), mixed(256), mixed(1024)),
            *self._draft_passes(min(self._max_tokens, 64), *sizes),
        ]

    def _smallest(self) -> list[Callable[[], Tensor]]:
        """Those of one request, which has kernels of its own."""
        tokens = min(self._max_tokens, 64)
        return [
            lambda: ops.argmax(self._run(*self._decode([1]))),
            *self._draft_passes(tokens, 1),
        ]

    def _run(self, *shapes: StepShape) -> Tensor:
        with rehearsal():
            for shape in shapes:
                result = compute_padding(self._forward_pass, shape)
        return result

    def _decode(self, sizes: Iterable[int]) -> list[StepShape]:
        widths = self._config.decode_widths
        return [StepShape.decode(n, each) for each in widths for n in sizes]

    def _draft_passes(self, tokens: int, *requests: int) -> list[Callable[[], Tensor]]:
        """Passes of a model that drafts, in steps of so many tokens and requests."""
        if self._drafter is None:
            return []
        sizes = ((max(tokens, each), each) for each in requests)
        return [run for each in sizes for run in self._drafter.forward_passes(*each)]

    def _draws(self) -> None:
        """Calls of the ops that draw."""
        dtype = next(self._model.parameters()).dtype  # as of logits
        example_draws(self._model.vocab_size, self._config.num_drafts, dtype, self._platform)

    def _rest(self) -> None:
        """Calls of the other ops that surround a forward pass."""
        for width in self._config.decode_widths:
            self._buffers.example(StepShape.decode(1, width))
        self._buffers.example(StepShape.mixed(2, 1))
        if self._drafter is not None:
            self._drafter.example()
        if parse_verify(self._config.graph_verify).startup:
            Guard(self._forward_pass).example()

    def measure_activations(self) -> int:
        """Peak bytes of the largest step beyond the weights; 0 where nothing counts them."""
        if not self._platform.counts_memory:
            return 0
        peak = 0
        try:
            gc.collect(1)  # what the start has left over is not to be counted as used
            self._platform.synchronize()
            self._platform.reset_peak_memory()
            before = self._platform.memory_allocated()
            with self._ops.activate(), rehearsal():
                tokens, requests = self._max_tokens, self._config.max_num_seqs
                self._forward_pass.forward(StepShape.mixed(tokens, requests))
                decode = StepShape.decode(requests, 1 + self._config.num_drafts)
                logits = self._forward_pass.forward(decode).float()
                logits.clone().softmax(dim=-1).add_(logits)
                del logits
                for each in self._draft_passes(tokens, requests):
                    each()
            self._platform.synchronize()
            peak = self._platform.peak_memory_allocated() - before
            self._platform.empty_cache()
        except Exception as error:  # drivers fail with errors of many types
            logger.warning("activation memory could not be measured (%s)", describe(error))
        logger.info("activations: %.2f GiB at %d tokens", peak / 2**30, self._max_tokens)
        return peak

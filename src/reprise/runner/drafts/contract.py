"""What drafts tokens for a step to verify beside the newest one of each request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from reprise.cache import CacheLayout
from reprise.config import EngineConfig
from reprise.distributed import ALONE_AGREES, Agreement
from reprise.graphs import (
    Buckets,
    Computation,
    GraphPlan,
    GraphPool,
    GraphRunner,
    VerifyMode,
    parse_buckets,
    parse_plan,
    parse_verify,
)
from reprise.graphs.plan import Wanted
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers
from reprise.shape import StepShape
from reprise.step import Step


@dataclass(frozen=True)
class GraphOptions:
    """How the graphs of an engine are made, of all owners."""

    plan: GraphPlan[Wanted]
    buckets: Buckets
    max_requests: int
    verify: VerifyMode
    pool: GraphPool
    """Of all owners: a step's target and what drafts behind it run one after the other."""
    agreement: Agreement = ALONE_AGREES

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        max_tokens: int,
        platform: Platform,
        agreement: Agreement = ALONE_AGREES,
    ) -> GraphOptions:
        """The options of an engine whose steps have ``max_tokens`` tokens at most."""
        return cls(
            parse_plan(config.graph_mode),
            parse_buckets(config.graph_buckets, config.max_num_seqs, max_tokens),
            config.max_num_seqs,
            parse_verify(config.graph_verify),
            GraphPool(platform),
            agreement,
        )

    def runner(
        self,
        computation: Computation,
        buffers: StepBuffers,
        widths: Iterable[int],
        owner: str = "",
        *,
        lazy: bool = False,
    ) -> GraphRunner:
        """Of a computation whose decode steps have one of ``widths`` tokens a request."""
        return GraphRunner(
            computation, buffers.platform, self.plan, self.buckets, self.max_requests,
            verify=self.verify, query_lens=tuple(dict.fromkeys(widths)), pool=self.pool,
            owner=owner, agreement=self.agreement, lazy=lazy,
        )  # fmt: skip


class Drafter:
    """Fills what rows have behind their newest tokens. Works on the device alone, and no other part
    knows in how many passes, or of what."""

    owners: Mapping[str, GraphRunner] = {}
    """The runners of its graphs, by names for people; empty if it computes no model."""
    in_step = False
    """Its passes wait for those of other engines, which compute steps together with this one: it
    takes part in steps without requests, too."""

    # ---- before steps --------------------------------------------------------------------

    def plan_graphs(self, options: GraphOptions) -> None:
        """Make what runs its passes, with graphs as the engine's options say."""

    def use_cache(self, layout: CacheLayout, max_model_len: int) -> None:
        """The pools have these sizes; the target's pass knows already."""

    def forward_passes(self, tokens: int, requests: int) -> Sequence[Callable[[], Tensor]]:
        """Its passes at a size, for kernels to be compiled and memory to be measured."""
        return ()

    def example(self) -> None:
        """Call once what surrounds its passes, which changes nothing."""

    # ---- steps ---------------------------------------------------------------------------

    def admit(self, step: Step) -> None:
        """Rows have new owners, whose known tokens the step says."""

    def judge(self, step: Step, rows: Tensor, first_draw: Tensor, drawn: Tensor) -> None:
        """Tokens were drawn; the rows have not moved on yet.

        Args:
            step: Whose they are.
            rows: [R] int64, the step's.
            first_draw: [R + 1] int32, where each request's draws begin.
            drawn: [D] int64.
        """

    def propose(
        self,
        step: Step,
        rows: Tensor,
        emitted: Tensor,
        shape: StepShape,
        at_least: StepShape | None,
    ) -> None:
        """The rows have moved on: draft.

        Args:
            step: Whose they are.
            rows: [R] int64, the step's.
            emitted: [R, 1 + K] int64, their new tokens, -1 behind them.
            shape: What the step was laid out as.
            at_least: As of :meth:`reprise.graphs.GraphRunner.run`, of that step.
        """
        raise NotImplementedError

    def memory(self) -> dict[str, Tensor]:
        """What lies on the device from step to step, by name."""
        raise NotImplementedError

    def forget(self) -> None:
        """A step failed half-way, or inputs were overwritten: the next step is begun anew."""

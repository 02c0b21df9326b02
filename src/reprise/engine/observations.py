"""What the engine counts beside its scheduler, and all of it as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from reprise.engine.draft_counts import DraftCounts
from reprise.engine.scheduler_counts import SchedulerStats
from reprise.metrics import Counter, Distribution, Gauge, Metric, steps_1_2_5
from reprise.parallel import Lockstep
from reprise.request import Request
from reprise.runner import StepOutput
from reprise.step import Step

_SECONDS = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640,
    2560,
]  # fmt: skip

OURS = ("expert_", "lockstep_")
"""What names of metrics begin with that vLLM does not have."""


class Observations:
    """Distributions over requests, counted when each ends, and over steps.

    Args:
        model: Its name, the label of every metric.
        max_model_len: Most tokens of a request.
        max_tokens: Most tokens of a step.
        num_drafts: Most tokens that are drafted behind a request's newest one.
    """

    def __init__(
        self, model: str, max_model_len: int, max_tokens: int, num_drafts: int = 0
    ) -> None:
        self._labels = {"model_name": model}
        lengths = steps_1_2_5(max_model_len)
        self._prompt_tokens = Distribution(lengths)
        self._generated_tokens = Distribution(lengths)
        self._max_tokens = Distribution(lengths)
        self._completions = Distribution(steps_1_2_5(20))
        self._first_token = Distribution(_SECONDS)
        self._per_token = Distribution(_SECONDS)
        self._total = Distribution(_SECONDS)
        self._queue = Distribution(_SECONDS)
        self._prefill = Distribution(_SECONDS)
        self._decode = Distribution(_SECONDS)
        self._inference = Distribution(_SECONDS)
        self._step_tokens = Distribution(steps_1_2_5(max_tokens))
        self.drafts = DraftCounts(num_drafts)

    def step(self, step: Step, output: StepOutput) -> None:
        """A step of requests has brought its results."""
        self._step_tokens.add(step.num_tokens)
        if output.drafted:
            self.drafts.add(step.num_decodes, output.drafted, output.sampled)

    def ended(self, request: Request) -> None:
        """A request has finished or was aborted."""
        self._prompt_tokens.add(request.num_prompt_tokens)
        self._generated_tokens.add(request.num_output_tokens)
        self._completions.add(request.params.n)
        if request.params.max_tokens is not None:
            self._max_tokens.add(request.params.max_tokens)
        arrival, scheduled = request.arrival_time, request.first_scheduled_time
        first, last, end = request.first_token_time, request.last_token_time, request.finished_time
        if scheduled is not None:
            self._queue.add(scheduled - arrival)
        if end is not None:
            self._total.add(end - arrival)
        if scheduled is None or first is None or last is None:
            return
        self._first_token.add(first - arrival)
        self._prefill.add(first - scheduled)
        self._decode.add(last - first)
        self._inference.add(last - scheduled)
        if request.num_output_tokens > 1:
            self._per_token.add((last - first) / (request.num_output_tokens - 1))

    def metrics(
        self,
        stats: SchedulerStats,
        lockstep: Lockstep | None = None,
        experts: Mapping[str, Sequence[int]] | None = None,
        expert_ranks: int = 1,
    ) -> list[Metric]:
        """All metrics of this moment.

        Args:
            stats: The scheduler's.
            lockstep: Of engines that compute in step, if this is one.
            experts: By layer, of each expert the tokens that it has got, if they are counted.
            expert_ranks: Ranks over which whole experts are spread.
        """
        labels = self._labels
        gauges = {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": stats.cache_usage,
        }
        counters = {
            "prefix_cache_queries": stats.total_prefix_queries,
            "prefix_cache_hits": stats.total_prefix_hits,
            "num_preemptions": stats.total_preemptions,
            "prompt_tokens": stats.total_prompt_tokens,
            "generation_tokens": stats.total_generated_tokens,
            "corrupted_requests": stats.total_finished["error"],
        }
        drafts = self.drafts.stats()
        if drafts.accepted_at:
            counters.update(
                spec_decode_num_drafts=drafts.drafts,
                spec_decode_num_draft_tokens=drafts.drafted,
                spec_decode_num_accepted_tokens=drafts.accepted,
            )
        if lockstep is not None:
            gauges["lockstep_waited_seconds"] = lockstep.waited_seconds
            counters.update(
                lockstep_meetings=lockstep.meetings, lockstep_empty_steps=lockstep.empty_steps
            )
        distributions = {
            "iteration_tokens_total": self._step_tokens,
            "request_prompt_tokens": self._prompt_tokens,
            "request_generation_tokens": self._generated_tokens,
            "request_params_max_tokens": self._max_tokens,
            "request_params_n": self._completions,
            "time_to_first_token_seconds": self._first_token,
            "request_time_per_output_token_seconds": self._per_token,
            "e2e_request_latency_seconds": self._total,
            "request_queue_time_seconds": self._queue,
            "request_prefill_time_seconds": self._prefill,
            "request_decode_time_seconds": self._decode,
            "request_inference_time_seconds": self._inference,
        }
        return [
            *(Gauge(f"reprise:{name}", dict(labels), each) for name, each in gauges.items()),
            *(Counter(f"reprise:{name}", dict(labels), each) for name, each in counters.items()),
            *(
                Counter("reprise:request_success", {**labels, "finished_reason": reason}, count)
                for reason, count in stats.total_finished.items()
            ),
            *(
                Counter(
                    "reprise:spec_decode_num_accepted_tokens_per_pos",
                    {**labels, "position": str(place)},
                    count,
                )
                for place, count in enumerate(drafts.accepted_at)
            ),
            *(each.histogram(f"reprise:{name}", labels) for name, each in distributions.items()),
            *self._of_experts(experts or {}, expert_ranks),
        ]

    def _of_experts(self, experts: Mapping[str, Sequence[int]], ranks: int) -> Iterator[Metric]:
        for layer, counts in experts.items():
            labels = {**self._labels, "layer": layer}
            for number, count in enumerate(counts):
                yield Counter("reprise:expert_tokens", {**labels, "expert": str(number)}, count)
            each = len(counts) // ranks
            for rank in range(ranks if ranks > 1 else 0):
                mine = sum(counts[rank * each : (rank + 1) * each])
                yield Counter("reprise:expert_rank_tokens", {**labels, "rank": str(rank)}, mine)

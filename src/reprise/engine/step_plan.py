"""A step while it is scheduled: decodes first, then chunks of tokens that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reprise.cache.request_table import Checkpoint
from reprise.request import Request
from reprise.step import Admission, Step, TableEdit


@dataclass(slots=True, eq=False)
class ScheduledStep:
    """A step, and whose it is."""

    step: Step
    requests: list[Request]
    starts: list[int]
    """Of the chunks: where they begin."""
    checkpoints: Sequence[Checkpoint | None] = ()
    """Of the step's copies, what they make."""


@dataclass(slots=True)
class StepPlan:
    """What a step is made of so far.

    Decodes are appended to ``requests`` alone, since all of them are alike; when the last one is
    there, chunks follow.
    """

    edits: list[list[TableEdit]]
    """Of each table."""
    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Of the chunks, like ``samples`` and ``starts``."""
    samples: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)

    def add_chunk(self, request: Request, start: int, count: int, samples: bool) -> None:
        """Compute ``count`` known tokens of the request from ``start`` on; ``samples``: they are
        its last ones, and a token is drawn behind them."""
        self.requests.append(request)
        self.counts.append(count)
        self.samples.append(samples)
        self.starts.append(start)

    def admit(self, request: Request) -> None:
        """Tell the runner all that it ever has to know of a request, which has got a row."""
        request.num_sent = [0] * len(request.tables)
        request.num_left_sent = [0] * len(request.tables)
        self.admitted.append(
            Admission(
                row=request.row,
                request_id=request.request_id,
                start=request.num_computed_tokens,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                limit=request.max_total_tokens - 1,
                params=request.params,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
                bad_words=request.bad_words,
                replay=request.replay,
            )
        )

    def edit_tables(self, request: Request) -> None:
        """Tell the runner what is new in the request's tables; with it, what has been given back
        since: it is not read."""
        for number, (blocks, edits) in enumerate(zip(request.tables, self.edits, strict=True)):
            sent, left = request.num_sent[number], request.num_left[number]
            if sent < len(blocks):
                first = min(request.num_left_sent[number], sent)
                if first < min(left, sent):
                    edits.append(TableEdit(request.row, first, blocks[first : min(left, sent)]))
                edits.append(TableEdit(request.row, sent, blocks[sent:]))
                request.num_sent[number], request.num_left_sent[number] = len(blocks), left


class RowLists:
    """Rows, counts, drafts and samples of a :class:`Step`; of decodes the same lists as long as
    their rows are the same, so that the runner sees at a glance that nothing has changed."""

    def __init__(self) -> None:
        self._rows: Sequence[int] = ()
        self._counts: Sequence[int] = ()
        self._drafts: Sequence[int] = ()
        self._samples: Sequence[bool] = ()

    def of(
        self, plan: StepPlan, num_decodes: int, verified: int
    ) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]:
        """The lists of a step.

        Args:
            plan: Of the step.
            num_decodes: Of its requests, the first ones.
            verified: Drafted tokens that each of these verifies.
        """
        requests = plan.requests
        rows = [each.row for each in requests[:num_decodes]]
        if rows != self._rows or (num_decodes and self._drafts[0] != verified):
            self._rows, self._counts = rows, [1] * num_decodes
            self._drafts, self._samples = [verified] * num_decodes, [True] * num_decodes
        if len(requests) == num_decodes:
            return self._rows, self._counts, self._drafts, self._samples
        return (
            [*self._rows, *(each.row for each in requests[num_decodes:])],
            [*self._counts, *plan.counts],
            [*self._drafts, *([0] * (len(requests) - num_decodes))],
            [*self._samples, *plan.samples],
        )

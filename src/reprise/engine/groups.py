"""Callers' unfinished requests, and what a step's tokens are to them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from reprise.engine.completion import Completion, CompletionGroup
from reprise.engine.observations import Observations
from reprise.engine.scheduler import Scheduler
from reprise.engine.structured import Grammars
from reprise.errors import FailedRequestError, GrammarError, NonFiniteError
from reprise.outputs import Logprobs
from reprise.request import Request
from reprise.runner import StepOutput
from reprise.step import Step

logger = logging.getLogger(__name__)


class Groups:
    """Every unfinished request of a caller is here, with its completions; each completion's is the
    scheduler's too, until it has ended there.

    Args:
        scheduler: Gets the requests, and ends those whose text or grammar has ended.
        grammars: Of requests whose text has a form.
        observations: Hear of the end of each.
        dtype: Of the model, for what is said where numbers overflow.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        grammars: Grammars,
        observations: Observations,
        dtype: torch.dtype,
    ) -> None:
        self._scheduler = scheduler
        self._grammars = grammars
        self._observations = observations
        self._dtype = dtype
        self._groups: dict[str, CompletionGroup] = {}
        self._completions: dict[Request, tuple[CompletionGroup, Completion]] = {}
        """Where a request's results go, until its group has finished or is aborted."""

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def __iter__(self) -> Iterator[str]:
        """The ids of unfinished requests."""
        return iter(self._groups)

    def add(self, group: CompletionGroup, grammar: Any = None) -> None:
        """Have a request computed.

        Args:
            group: The request; no unfinished one has its id.
            grammar: Compiled, that its texts have to match.

        Raises:
            RepriseError: The scheduler refuses it; nothing of it stays.
        """
        added: list[Request] = []
        for each in group.completions:
            try:
                self._scheduler.add(each.request)
            except Exception:
                for request in added:
                    self._scheduler.abort(request.request_id)
                raise
            added.append(each.request)
        self._groups[group.request_id] = group
        for each in group.completions:
            self._completions[each.request] = (group, each)
            if grammar is not None:
                self._grammars.add(each.request, grammar)

    def abort(self, request_ids: Iterable[str]) -> list[CompletionGroup]:
        """End requests early; unknown and finished ones are ignored. Returns those that ended."""
        ended = [self._groups[name] for name in dict.fromkeys(request_ids) if name in self._groups]
        for group in ended:
            self._end_rest(group)
            self._forget(group)
        return ended

    def clear(self) -> None:
        """Forget all, which the scheduler has ended."""
        self._grammars.clear()
        self._groups.clear()
        self._completions.clear()

    def take(
        self,
        step: Step,
        requests: Sequence[Request],
        output: StepOutput,
        unseen: str | None = None,
    ) -> list[CompletionGroup]:
        """Give a step's results to its requests. Returns those that have new tokens or ended.

        Args:
            step: The oldest one that the scheduler awaits.
            requests: The step's.
            output: Its results.
            unseen: The graph that gave them, if they were compared with nothing.
        """
        completions = self._completions
        for number, (start, entries) in output.prompt_logprobs.items():
            known = completions.get(requests[number])
            if known is not None:  # not aborted meanwhile
                known[0].set_prompt_logprobs(start, entries)
        logprobs: dict[Request, list[Logprobs]] = {}
        if output.logprobs is not None:
            found = zip(requests, output.logprobs, strict=True)
            logprobs = {request: entries for request, entries in found if entries is not None}
        # The hot loop of a serving engine: attribute access is what costs.
        changed: dict[CompletionGroup, None] = {}
        ended: dict[CompletionGroup, None] = {}
        grammars_left = self._grammars.left
        for request in self._scheduler.update(step, output.sampled, output.failed, output.spoilt):
            group, completion = completions[request]
            if request.finish_reason == "error":
                self._fail(group, self._no_numbers(group, completion, unseen))
            elif request in grammars_left:
                self._keep_to_grammar(group, completion)
            if completion.reads_tokens and not completion.read():
                self._read(completion, logprobs.get(request))
            if request.finish_reason is not None:
                ended[group] = None
            changed[group] = None
        # Not before: several completions of a request may have ended in this step.
        for group in ended:
            if group.finished:
                self._forget(group)
        return list(changed)

    def _keep_to_grammar(self, group: CompletionGroup, completion: Completion) -> None:
        """End a request whose grammar has ended, or was left, with its newest tokens."""
        request = completion.request
        surplus = self._grammars.surplus(request)
        if surplus is None or request.finish_reason == "stop":
            return
        if self._grammars.ended(request):
            self._scheduler.finish(request, "stop", None, surplus)
            return
        token = request.output_token_ids[-surplus]
        self._scheduler.finish(request, "error", None, surplus)
        error = GrammarError(
            f"request {group.request_id!r} has drawn token {token} behind "
            f"{request.num_output_tokens} others, which its structured_outputs does not allow: it "
            "was ended, please report this"
        )
        self._fail(group, error)

    def _fail(self, group: CompletionGroup, error: FailedRequestError) -> None:
        """End a request that cannot be finished, all its completions."""
        if group.error is not None:
            return
        self._end_rest(group)
        group.error = error
        logger.error("%s; it was ended", error)

    def _no_numbers(
        self, group: CompletionGroup, completion: Completion, unseen: str | None
    ) -> NonFiniteError:
        cause = "the model overflows with this prompt; compare it with another implementation"
        if self._dtype is torch.float16:
            cause = "start with dtype='bfloat16' or 'float32', whose numbers reach further"
        if unseen is not None:
            cause += f"; or graph {unseen} is wrong: graph_verify='canary:1' compares each replay"
        return NonFiniteError(
            f"the logits of output token {completion.request.num_output_tokens} of request "
            f"{group.request_id!r} are not finite (NaN or infinite) in "
            f"{str(self._dtype).removeprefix('torch.')}: {cause}"
        )

    def _read(self, completion: Completion, logprobs: Sequence[Logprobs] | None) -> None:
        """Give a completion the tokens that its request has got, up to a stop string."""
        request = completion.request
        tokens = request.output_token_ids[completion.num_tokens :]
        for number, token in enumerate(tokens, 1):
            entry = None if logprobs is None else logprobs[number - 1]
            stop = completion.append(token, entry, number == len(tokens))
            if stop is not None:
                self._scheduler.finish(request, "stop", stop, surplus=len(tokens) - number)
                return

    def _end_rest(self, group: CompletionGroup) -> None:
        """End the completions that have not finished; the name of one that has may be another
        request's by now."""
        for each in group.completions:
            if not each.request.is_finished:
                self._scheduler.abort(each.request.request_id)
                each.finish()

    def _forget(self, group: CompletionGroup) -> None:
        del self._groups[group.request_id]
        for each in group.completions:
            del self._completions[each.request]
            self._grammars.discard(each.request)
            self._observations.ended(each.request)

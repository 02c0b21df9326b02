"""A caller's request: its ``n`` completions and what they have produced."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.engine.detokenizer import Detokenizer, TokenTexts
from reprise.outputs import (
    CompletionOutput,
    Logprobs,
    RequestMetrics,
    RequestOutput,
)
from reprise.request import Request
from reprise.sampling_params import SamplingParams


class Completion:
    """One of a request's completions, while it grows.

    Args:
        index: Among the request's ``n``.
        request: The scheduler's.
        texts: Of the tokenizer; None: token ids only.
    """

    def __init__(self, index: int, request: Request, texts: TokenTexts | None) -> None:
        self.index = index
        self.request = request
        self.logprobs: list[Logprobs] | None = None
        self.cumulative_logprob: float | None = None
        if request.params.logprobs is not None:
            self.logprobs, self.cumulative_logprob = [], 0.0
        self.texts = texts if request.params.detokenize else None
        self.detokenizer: Detokenizer | None = None
        if self.texts is not None:
            self.detokenizer = Detokenizer(self.texts, request.prompt_token_ids, request.params)
        self.reads_tokens = self.logprobs is not None or self.detokenizer is not None
        """Whether :meth:`append` does anything; the request itself keeps the token ids."""

    def append(self, token: int, logprobs: Logprobs | None) -> str | None:
        """Add a token that the scheduler accepted; returns a stop string if the text has one."""
        if logprobs is not None:
            assert self.logprobs is not None
            assert self.cumulative_logprob is not None
            name_tokens(logprobs, self.texts)
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[token].logprob
        if self.detokenizer is None:
            return None
        found, reason = None, self.request.finish_reason
        # A token that ends the request is part of its text only if that is asked for.
        if reason != "stop" or self.request.params.include_stop_str_in_output:
            found = self.detokenizer.append([token])
        if found is None and reason is not None:
            found = self.detokenizer.finish()
        return found

    def finish(self) -> None:
        """It was aborted: no token follows."""
        if self.detokenizer is not None:
            self.detokenizer.finish()

    def output(self) -> CompletionOutput:
        request = self.request
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.text[: self.detokenizer.stable_length(request.is_finished)]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(request.output_token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


def name_tokens(entry: Logprobs, texts: TokenTexts | None) -> None:
    """Add the text of each token, which may be part of a character only."""
    if texts is not None:
        for token, logprob in entry.items():
            logprob.decoded_token = texts.of(token)


class CompletionGroup:
    """A caller's request with all its completions.

    Args:
        request_id: The caller's.
        prompt: Text, if the caller gave text.
        params: As the caller gave them.
        completions: ``params.n`` of them.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        completions: list[Completion],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.completions = completions
        first = completions[0].request
        self.prompt_logprobs: list[Logprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * first.num_prompt_tokens

    @property
    def finished(self) -> bool:
        # Asked of every request in every step: a generator would cost as much again.
        for each in self.completions:  # noqa: SIM110
            if each.request.finish_reason is None:
                return False
        return True

    def set_prompt_logprobs(self, start: int, entries: Sequence[Logprobs]) -> None:
        """The step that began at token ``start`` gave these for the tokens behind it."""
        assert self.prompt_logprobs is not None
        for entry in entries:
            name_tokens(entry, self.completions[0].texts)
        self.prompt_logprobs[start + 1 : start + 1 + len(entries)] = entries

    def output(self) -> RequestOutput:
        """A snapshot: it does not change when the completions grow."""
        requests = [each.request for each in self.completions]
        first = requests[0]
        tokens_at = [each.first_token_time for each in requests if each.first_token_time]
        finished_at = [each.finished_time for each in requests if each.finished_time]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[each.output() for each in self.completions],
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_time=first.arrival_time,
                first_scheduled_time=first.first_scheduled_time,
                first_token_time=min(tokens_at, default=None),
                finished_time=max(finished_at, default=None) if self.finished else None,
                num_cached_tokens=first.num_cached_tokens,
                num_preemptions=sum(each.num_preemptions for each in requests),
            ),
            prompt_logprobs=self.prompt_logprobs,
        )

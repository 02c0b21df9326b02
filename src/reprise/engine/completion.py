"""A caller's request: its ``n`` completions and what they have produced."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.engine.detokenizer import Detokenizer, TokenTexts
from reprise.errors import FailedRequestError
from reprise.outputs import (
    CompletionOutput,
    Logprobs,
    RequestMetrics,
    RequestOutput,
    WholeLogprobs,
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
        self._sent: tuple[int, int, bool | None] = (0, 0, None)
        """Tokens and characters that deltas have had, and whether the last had the end."""
        self.num_tokens = 0
        """Tokens that :meth:`append` was given."""
        self.reads_tokens = self.logprobs is not None or self.detokenizer is not None
        """Whether :meth:`append` does anything; the request itself keeps the token ids."""

    def read(self) -> bool:
        """:meth:`append` the one token that the request has got, if that adds to the text and
        nothing else, as in nearly every step. False: nothing was done."""
        request, detokenizer = self.request, self.detokenizer
        if self.logprobs is not None or detokenizer is None or request.finish_reason is not None:
            return False
        ids = request.output_token_ids
        if len(ids) != self.num_tokens + 1 or not detokenizer.add(ids[-1]):
            return False
        self.num_tokens += 1
        return True

    def append(self, token: int, logprobs: Logprobs | None, newest: bool = True) -> str | None:
        """Add a token that the scheduler accepted; returns a stop string if the text has one.

        Args:
            token: The next one.
            logprobs: Of it and others in its place, if the request wants them.
            newest: The request has none behind it.
        """
        self.num_tokens += 1
        if logprobs is not None:
            assert self.logprobs is not None
            assert self.cumulative_logprob is not None
            name_tokens(logprobs, self.texts)
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[token].logprob
        if self.detokenizer is None:
            return None
        found, reason = None, self.request.finish_reason if newest else None
        # A token that ends the request is part of its text only if that is asked for.
        if reason != "stop" or self.request.params.include_stop_str_in_output:
            found = self.detokenizer.append([token])
        if found is None and reason is not None:
            found = self.detokenizer.finish()
        return found

    def finish(self) -> None:
        """End a completion that was aborted, or has failed: no token follows."""
        if self.detokenizer is not None:
            self.detokenizer.finish()

    def output(self) -> CompletionOutput:
        """Everything so far."""
        return self._output(0, 0, self._length())

    def delta(self) -> CompletionOutput | None:
        """What is new since the last call; None if nothing is. The first call always returns."""
        tokens, characters, _ = self._sent
        length = self._length()
        now = (self.request.num_output_tokens, length, self.request.is_finished)
        if now == self._sent:
            return None
        self._sent = now
        return self._output(tokens, characters, length)

    def text_alone(self) -> tuple[str, list[int]] | None:
        """As :meth:`CompletionGroup.text_alone`."""
        request, detokenizer = self.request, self.detokenizer
        if request.finish_reason is not None or request.suspect_from is not None:
            return None
        tokens, begin, _ = self._sent
        ids = request.output_token_ids[tokens:]
        end = 0 if detokenizer is None else detokenizer.stable_length(False)
        if not ids and end == begin:
            return None
        self._sent = (tokens + len(ids), end, False)
        return "" if detokenizer is None else detokenizer.text[begin:end], ids

    def _length(self) -> int:
        """Characters that can be shown."""
        if self.detokenizer is None:
            return 0
        return self.detokenizer.stable_length(self.request.is_finished)

    def _output(self, first_token: int, begin: int, end: int) -> CompletionOutput:
        request = self.request
        return CompletionOutput(
            index=self.index,
            text="" if self.detokenizer is None else self.detokenizer.text[begin:end],
            token_ids=request.output_token_ids[first_token:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[first_token:],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            suspect_from=request.suspect_from,
        )


def name_tokens(entry: Logprobs, texts: TokenTexts | None) -> None:
    """Add the text of each token, which may be part of a character only."""
    if texts is None:
        return
    if isinstance(entry, WholeLogprobs):
        entry.decode = texts.of
        return
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
        self.error: FailedRequestError | None = None
        """Why it was ended, if its caller did not ask for that."""
        self._metrics: RequestMetrics | None = None
        self._began = False
        """Whether a delta was taken."""
        self._only: Completion | None = None
        """The one completion, if nothing is asked for but text and tokens."""
        if len(completions) == 1 and completions[0].logprobs is None:
            self._only = completions[0]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.completions[0].request.prompt_token_ids

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
        """Everything so far: a snapshot, which does not change when the completions grow."""
        return self._output([each.output() for each in self.completions], self.prompt_logprobs)

    def delta(self) -> RequestOutput:
        """What is new since the last call, in time that does not grow with what is not.

        Log probabilities of the prompt are in the first delta alone.
        """
        news = [each.delta() for each in self.completions]
        prompt_logprobs = None if self._began else self.prompt_logprobs
        self._began = True
        return self._output([each for each in news if each is not None], prompt_logprobs)

    def text_alone(self) -> tuple[str, list[int]] | None:
        """The text and the tokens that are new, as :meth:`delta` would have them, if that is all
        there is to say, as in nearly every step: in a fraction of the time. None: ask that."""
        return self._only.text_alone() if self._began and self._only is not None else None

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: list[Logprobs | None] | None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.completions[0].request.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=self._metrics_now(),
            prompt_logprobs=prompt_logprobs,
        )

    def _metrics_now(self) -> RequestMetrics:
        """Made anew when they have changed: seldom between the first token and the last."""
        first = self.completions[0].request
        preemptions = first.num_preemptions
        if len(self.completions) > 1:
            preemptions = sum(each.request.num_preemptions for each in self.completions)
        known = self._metrics
        if (
            known is not None
            and known.first_token_time is not None
            and known.num_preemptions == preemptions
            and not self.finished
        ):
            return known
        requests = [each.request for each in self.completions]
        tokens_at = [each.first_token_time for each in requests if each.first_token_time]
        finished_at = [each.finished_time for each in requests if each.finished_time]
        self._metrics = RequestMetrics(
            arrival_time=first.arrival_time,
            first_scheduled_time=first.first_scheduled_time,
            first_token_time=min(tokens_at, default=None),
            finished_time=max(finished_at, default=None) if self.finished else None,
            num_cached_tokens=first.num_cached_tokens,
            num_preemptions=preemptions,
        )
        return self._metrics

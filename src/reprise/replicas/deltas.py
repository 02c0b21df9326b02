"""What is new of a request, as a replica sends it: tuples, which take a fraction of the time that
objects take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reprise.logprobs import Logprob, Logprobs, WholeLogprobs
from reprise.outputs import CompletionOutput, RequestMetrics, RequestOutput


def pack(delta: RequestOutput, metrics: RequestMetrics | None) -> tuple[Any, ...]:
    """All but what the other side knows: name and prompt.

    Args:
        delta: Of a request.
        metrics: None: as before.
    """
    outputs = [
        (
            each.index, each.text, each.token_ids, each.cumulative_logprob,
            _pack_all(each.logprobs), each.finish_reason, each.stop_reason, each.suspect_from,
        )
        for each in delta.outputs
    ]  # fmt: skip
    times = metrics and (
        metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time,
        metrics.finished_time, metrics.num_cached_tokens, metrics.num_preemptions,
    )  # fmt: skip
    return outputs, delta.finished, times, _pack_all(delta.prompt_logprobs)


def unpack(
    packed: tuple[Any, ...],
    request_id: str,
    prompt: str | None,
    prompt_token_ids: list[int],
    metrics: RequestMetrics | None,
    text_of: Callable[[int], str] | None,
) -> RequestOutput:
    """The delta.

    Args:
        packed: By :func:`pack`.
        request_id: The caller's.
        prompt: If it was text.
        prompt_token_ids: Of the request.
        metrics: Of the delta before.
        text_of: Gives a token's text.
    """
    outputs, finished, times, prompt_logprobs = packed
    metrics = metrics if times is None else RequestMetrics(*times)
    assert metrics is not None, "the first delta has metrics"
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[
            CompletionOutput(index, text, ids, total, _unpack_all(logprobs, text_of), *rest)
            for index, text, ids, total, logprobs, *rest in outputs
        ],
        finished=finished,
        metrics=metrics,
        prompt_logprobs=_unpack_all(prompt_logprobs, text_of),
    )


def _pack_all(entries: Sequence[Logprobs | None] | None) -> list[Any] | None:
    return None if entries is None else [_pack(each) for each in entries]


def _pack(entry: Logprobs | None) -> Any:
    if entry is None:
        return None
    if isinstance(entry, WholeLogprobs):  # its texts are made when they are read
        return (*entry.parts, entry.decode is not None)
    return [(token, each.logprob, each.rank, each.decoded_token) for token, each in entry.items()]


def _unpack_all(
    entries: list[Any] | None, text_of: Callable[[int], str] | None
) -> list[Any] | None:
    return None if entries is None else [_unpack(each, text_of) for each in entries]


def _unpack(entry: Any, text_of: Callable[[int], str] | None) -> Logprobs | None:
    if entry is None:
        return None
    if isinstance(entry, tuple):
        chosen, values, has_texts = entry
        whole = WholeLogprobs(chosen, values)
        whole.decode = text_of if has_texts else None
        return whole
    return {token: Logprob(*rest) for token, *rest in entry}

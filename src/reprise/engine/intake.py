"""A prompt and parameters that were accepted, made into the scheduler's requests."""

from __future__ import annotations

import hashlib

from reprise.engine.completion import Completion, CompletionGroup
from reprise.engine.detokenizer import TokenTexts
from reprise.engine.prompt import PreparedPrompt
from reprise.engine.submission import PreparedParams, check_choice
from reprise.request import Request
from reprise.sampling_params import SamplingParams


def draw_seed(params: SamplingParams, engine_seed: int, ordinal: int, index: int) -> int:
    """64 bits that only the request's seed (or the engine's) and the completion decide.

    Args:
        params: Of the request.
        engine_seed: What counts if they have none, with ``ordinal``.
        ordinal: Number of requests before it.
        index: Of the completion.
    """
    source = (
        f"request {params.seed} {index}"
        if params.seed is not None
        else f"engine {engine_seed} {ordinal} {index}"
    )
    digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def new_group(
    request_id: str,
    prompt: PreparedPrompt,
    accepted: PreparedParams,
    priority: int,
    *,
    engine_seed: int,
    ordinal: int,
    eos_token_ids: frozenset[int],
    texts: TokenTexts | None,
) -> CompletionGroup:
    """A caller's request with a completion for each of its ``n``, none of which is computed yet.

    Args:
        request_id: The caller's.
        prompt: Its tokens.
        accepted: Its parameters.
        priority: Lower is more urgent.
        engine_seed: As of :func:`draw_seed`, like ``ordinal``.
        ordinal: Number of requests before it.
        eos_token_ids: The model's end-of-sequence tokens.
        texts: Of the tokenizer; None: token ids only.

    Raises:
        RequestError: The parameters leave no token to draw.
    """
    params = accepted.params
    completions = []
    for index in range(params.n):
        request = Request(
            request_id=request_id if params.n == 1 else f"{request_id}#{index}",
            prompt_token_ids=prompt.token_ids,
            params=params,
            priority=priority,
            cache_salt=prompt.cache_salt,
            eos_token_ids=eos_token_ids,
            seed=draw_seed(params, engine_seed, ordinal, index),
            bad_words=accepted.bad_words,
        )
        completions.append(Completion(index, request, texts))
    check_choice(accepted, completions[0].request.stop_token_ids)
    return CompletionGroup(request_id, prompt.text, params, completions)

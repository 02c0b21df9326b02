"""What the engine asks of sampling parameters beyond what they check themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reprise.arguments import is_whole, plain, shown
from reprise.engine.prompt import encode
from reprise.engine.structured import GrammarCompiler
from reprise.errors import RequestError
from reprise.sampling_params import WHOLE_VOCABULARY, SamplingParams

MAX_LOGPROBS = 20
"""Most alternatives by number for one position, unless ``max_logprobs`` says otherwise."""
MAX_WORD_TOKENS = 256
"""Of one bad word: so many tokens are kept of every request that has bad words."""
MAX_WORDS_TOKENS = 1 << 18
"""Of all bad words of a request: all are compared in every step."""


@dataclass(frozen=True)
class PreparedParams:
    """Parameters that the engine has accepted; they are not changed any more."""

    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...]
    """Token ids."""
    grammar: Any = None
    """Compiled, of ``params.structured_outputs``."""


def prepare_params(
    params: SamplingParams,
    tokenizer: Any,
    vocab_size: int,
    max_logprobs: int | None,
    compiler: GrammarCompiler | None,
) -> PreparedParams:
    """Take a copy, refuse what this model, tokenizer or engine cannot give, and tokenize.

    Args:
        params: A caller's.
        tokenizer: Of the engine, or None.
        vocab_size: Ids are smaller.
        max_logprobs: Of the engine.
        compiler: Of grammars; None: where the engine is they are compiled.

    Raises:
        RequestError: A field is invalid, a token is not in the vocabulary, a text needs a tokenizer
            that there is not, more is wanted than the engine gives, or a grammar does not compile.
    """
    params = params.snapshot()
    _check(params, tokenizer, vocab_size, max_logprobs)
    words = tuple(params.bad_words or ())
    bad = bad_word_tokens(words, tokenizer, vocab_size)
    wanted = params.structured_outputs
    if wanted is None or compiler is None:
        return PreparedParams(params, bad)
    return PreparedParams(params, bad, compiler.compile(wanted))


def whole_priority(priority: Any) -> int:
    """A request's priority as Python's own number.

    Raises:
        RequestError: It is none.
    """
    found = plain(priority)
    if not is_whole(found):
        raise RequestError(f"priority={shown(found)}: give a whole number; lower is more urgent")
    whole: int = found
    return whole


def _check(
    params: SamplingParams, tokenizer: Any, vocab_size: int, max_logprobs: int | None
) -> None:
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token in getattr(params, name) or ():
            if token >= vocab_size:
                raise RequestError(
                    f"{name} has token {token}: the vocabulary has ids 0 to {vocab_size - 1}"
                )
    for name in ("begin_after", "opened_by"):
        token = getattr(params.structured_outputs, name, None)
        if token is not None and token >= vocab_size:
            raise RequestError(
                f"structured_outputs.{name}={token}: the vocabulary has ids 0 to {vocab_size - 1}"
            )
    if tokenizer is None:
        for name, remedy in (("stop", "use stop_token_ids"), ("bad_words", "use logit_bias")):
            if getattr(params, name):
                raise RequestError(
                    f"{name}={shown(getattr(params, name))} needs text and no tokenizer is loaded "
                    f"(skip_tokenizer_init=True): {remedy}"
                )
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is None or max_logprobs == WHOLE_VOCABULARY:
            continue
        if max_logprobs is None and wanted == WHOLE_VOCABULARY:
            continue
        limit = MAX_LOGPROBS if max_logprobs is None else max_logprobs
        if (vocab_size if wanted == WHOLE_VOCABULARY else wanted) > limit:
            raise RequestError(
                f"{name}={wanted}: give at most {limit}, or raise the engine's max_logprobs"
            )


def check_choice(prepared: PreparedParams, stop_token_ids: frozenset[int]) -> None:
    """Refuse parameters that leave no token to draw.

    Args:
        prepared: Of the request.
        stop_token_ids: What ends it, which ``min_tokens`` forbids at first.

    Raises:
        RequestError: No token in ``allowed_token_ids`` may ever be drawn.
    """
    params = prepared.params
    if params.allowed_token_ids is None:
        return
    allowed = params.allowed_token_ids
    named = f"allowed_token_ids={shown(allowed)}"
    if params.min_tokens > 0 and all(each in stop_token_ids for each in allowed):
        raise RequestError(
            f"{named} all end the request, and min_tokens={params.min_tokens} forbids that: allow "
            "another token"
        )
    bad = {word[0] for word in prepared.bad_words if len(word) == 1}
    if all(each in bad for each in allowed):
        raise RequestError(f"{named} are all bad_words: allow another token")


def truncated(token_ids: list[int], params: SamplingParams, most: int) -> list[int]:
    """The last tokens of a prompt, as many as ``truncate_prompt_tokens`` says.

    Args:
        token_ids: The prompt's.
        params: Of the request.
        most: Tokens that prompt and output may have together.

    Raises:
        RequestError: It says more than a prompt may have.
    """
    wanted = params.truncate_prompt_tokens
    if wanted is None:
        return token_ids
    if wanted >= most:
        raise RequestError(
            f"truncate_prompt_tokens={wanted}: a prompt holds at most {most - 1} tokens here; give "
            "-1 for as many as leave room for max_tokens"
        )
    if wanted == -1:
        wanted = max(1, most - (params.max_tokens or 1))
    return token_ids[-wanted:]


def bad_word_tokens(
    words: tuple[str, ...], tokenizer: Any, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word, as it begins a text and as it follows a space.

    Raises:
        RequestError: A word has no tokens, or they are too many.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            ids = tuple(encode(tokenizer, text, "bad_words", add_special_tokens=False))
            if any(each >= vocab_size for each in ids):
                continue  # the model has no such token, so it cannot draw it
            if ids:
                found[ids] = None
            elif text == bare:
                raise RequestError(f"bad_words has {word!r}, which the tokenizer drops: remove it")
    longest = max(map(len, found), default=0)
    if longest > MAX_WORD_TOKENS:
        raise RequestError(
            f"bad_words has one of {longest} tokens: give at most {MAX_WORD_TOKENS} in each"
        )
    total = sum(map(len, found))
    if total > MAX_WORDS_TOKENS:
        raise RequestError(
            f"bad_words have {total} tokens, with and without a leading space: give at most "
            f"{MAX_WORDS_TOKENS} in all"
        )
    return tuple(found)

"""What callers may give as a prompt, made into token ids, and how long it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from reprise.arguments import is_whole, plain, shown
from reprise.errors import CapacityError, RequestError


class TokensPrompt(TypedDict):
    prompt: str
    prompt_token_ids: list[int]


_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_INPUTS = "this engine reads text and token ids alone"
_REFUSED = {
    "multi_modal_data": _INPUTS,
    "multi_modal_uuids": _INPUTS,
    "mm_processor_kwargs": _INPUTS,
    "prompt_embeds": _INPUTS,
    "token_type_ids": "models here have no token types",
    "encoder_prompt": "models here have no encoder",
    "decoder_prompt": "models here have no encoder",
}
"""Keys of vLLM's prompts that mean something which is not here. Empty ones are accepted, since
wrappers always pass them."""


def split_prompts(prompts: Any) -> list[Any]:
    """A single prompt, or a sequence of them, as a list."""
    prompts = plain(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(
            f"prompt={shown(prompts)}: give a string, a list of token ids, "
            "{'prompt_token_ids': [...]}, or a list of these"
        )
    if prompts and all(is_whole(plain(each)) for each in prompts):
        return [prompts]
    return list(prompts)


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt that :func:`prepare` has accepted."""

    text: str | None
    """If it was given as text."""
    token_ids: list[int]
    cache_salt: bytes = b""
    """Cached prefixes are shared only with prompts of the same salt."""


def prepare(prompt: Any, tokenizer: Any, vocab_size: int) -> PreparedPrompt:
    """Check a prompt and make it into token ids.

    Args:
        prompt: Text, token ids, or a dictionary with ``prompt``, ``prompt_token_ids`` (which count
            if both are there) and ``cache_salt``.
        tokenizer: transformers' tokenizer, or None if none is loaded.
        vocab_size: Ids are smaller.

    Raises:
        RequestError: It is empty, of a wrong type, has a key that means nothing here or ids outside
            the vocabulary.
    """
    text, salt = None, b""
    ids: Any = prompt
    if isinstance(prompt, Mapping):
        text, ids, salt = _read_mapping(prompt)
    elif isinstance(prompt, str):
        text, ids = prompt, None
    ids = plain(ids)
    if ids is None and text is not None:
        if tokenizer is None:
            raise RequestError(
                f"prompt={text[:40]!r} is text and no tokenizer is loaded "
                "(skip_tokenizer_init=True): give prompt_token_ids"
            )
        ids = encode(tokenizer, text)
    # Loops of Python's over a long prompt are a part of the time to its first token.
    if not _is_list(ids) or set(map(type, ids)) - {int}:
        ids = [plain(each) for each in ids] if _is_list(ids) else ids
        if not _is_list(ids) or not all(is_whole(each) for each in ids):
            raise RequestError(f"prompt_token_ids={short(ids)}: give a list of integers")
    if len(ids) == 0:
        raise RequestError(f"prompt={text if text is not None else []!r} is empty: give one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = [each for each in ids if not 0 <= each < vocab_size]
        raise RequestError(
            f"prompt_token_ids contains {short(wrong)}: the vocabulary has ids 0 to "
            f"{vocab_size - 1}"
        )
    return PreparedPrompt(plain(text), list(ids), salt)


def _read_mapping(prompt: Mapping[Any, Any]) -> tuple[str | None, Any, bytes]:
    """Its text, its token ids and its salt; text or ids are there."""
    for key, value in prompt.items():
        if key in _KEYS:
            continue
        if key in _REFUSED:
            if value is None or (isinstance(value, Mapping) and not value):
                continue
            raise RequestError(f"prompt has the key {shown(key)}: {_REFUSED[key]}")
        raise RequestError(f"prompt has the unknown key {shown(key)}: give {', '.join(_KEYS)}")
    text, ids, salt = (prompt.get(key) for key in _KEYS)
    if text is None and ids is None:
        raise RequestError(
            f"prompt has the keys {list(prompt)}: give 'prompt' or 'prompt_token_ids'"
        )
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt={short(text)}: give a string; ids are for 'prompt_token_ids'")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(f"cache_salt={short(salt)}: give a string that is not empty, or None")
    # Any string of Python's is a salt, also one that is no valid text.
    return text, ids, b"" if salt is None else salt.encode("utf-8", "surrogatepass")


def encode(tokenizer: Any, text: str, what: str = "prompt", **options: Any) -> list[int]:
    """A text's token ids.

    Args:
        tokenizer: Of the engine.
        text: A caller's.
        what: It is, for the error.
        **options: Of the tokenizer.

    Raises:
        RequestError: It has halves of surrogate pairs.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what}={text[:40]!r} is not valid text ({error.reason}, character {error.start}): "
            "give UTF-8, decoded"
        ) from error
    found: list[int] = tokenizer.encode(text, **options)
    return found


def _is_list(value: Any) -> bool:
    """Bytes are numbers to Python, and undecoded text to us; text is a list of texts."""
    others = str | bytes | bytearray | memoryview
    return isinstance(value, Sequence) and not isinstance(value, others)


def short(value: Any) -> str:
    """The value as messages of errors show it."""
    return shown(value, 60)


def check_fits(request_id: str, length: int, max_model_len: int, capacity: int) -> None:
    """Refuse a prompt that cannot be computed.

    Args:
        request_id: For messages.
        length: Of the prompt, in tokens.
        max_model_len: Most tokens of a request.
        capacity: Of the cache, in tokens.

    Raises:
        RequestError: It is empty.
        CapacityError: It does not fit the context or the cache.
    """
    if length == 0:
        raise RequestError(f"prompt of request {request_id!r} is empty: give at least one token")
    if length >= max_model_len:
        raise CapacityError(
            f"prompt of request {request_id!r} has {length} tokens and the context "
            f"holds {max_model_len}, output included: shorten it or raise max_model_len"
        )
    if length > capacity:
        raise CapacityError(
            f"prompt of request {request_id!r} has {length} tokens and the cache "
            f"holds {capacity}: shorten it or enlarge the cache"
        )

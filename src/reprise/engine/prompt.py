"""What callers may give as a prompt, made into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from reprise.arguments import is_whole, plain
from reprise.errors import RequestError


class TokensPrompt(TypedDict):
    prompt: str
    prompt_token_ids: list[int]


def split_prompts(prompts: Any) -> list[Any]:
    """A single prompt, or a sequence of them, as a list."""
    prompts = plain(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(
            f"prompt={prompts!r}: give a string, a list of token ids, "
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


def prepare(prompt: Any, tokenizer: Any, vocab_size: int) -> PreparedPrompt:
    """Check a prompt and make it into token ids.

    Raises:
        RequestError: It is empty, of a wrong type, or has ids outside the vocabulary.
    """
    text: str | None = None
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            text = prompt.get("prompt")
            ids = prompt["prompt_token_ids"]
        elif "prompt" in prompt:
            text = ids = prompt["prompt"]
        else:
            raise RequestError(
                f"prompt has the keys {sorted(prompt)}: give 'prompt' or 'prompt_token_ids'"
            )
    else:
        ids = prompt
    ids = plain(ids)
    if isinstance(ids, str):
        text = ids
        if tokenizer is None:
            raise RequestError(
                f"prompt={text[:40]!r} is text and no tokenizer is loaded "
                "(skip_tokenizer_init=True): give prompt_token_ids"
            )
        ids = _encode(tokenizer, text)
    if _is_list(ids) and not all(type(each) is int for each in ids):
        ids = [plain(each) for each in ids]
    if not _is_list(ids) or not all(is_whole(each) for each in ids):
        raise RequestError(f"prompt_token_ids={_short(ids)}: give a list of integers")
    if len(ids) == 0:
        raise RequestError(f"prompt={text if text is not None else []!r} is empty: give one token")
    wrong = [each for each in ids if not 0 <= each < vocab_size]
    if wrong:
        raise RequestError(
            f"prompt_token_ids contains {_short(wrong)}: the vocabulary has ids 0 to "
            f"{vocab_size - 1}"
        )
    return PreparedPrompt(text, list(ids))


def chat_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], **template_arguments: Any
) -> TokensPrompt:
    """A conversation as the prompt that the model was trained on.

    Args:
        tokenizer: transformers' tokenizer, or None if none is loaded.
        messages: ``[{"role": "user", "content": "hi"}, ...]``.
        **template_arguments: Of ``apply_chat_template`` and variables of the template.

    Raises:
        RequestError: The messages are malformed or the tokenizer has no chat template.
    """
    if tokenizer is None:
        raise RequestError("messages need a tokenizer, and skip_tokenizer_init=True loads none")
    if not messages:
        raise RequestError("messages is empty: give at least one message")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **template_arguments)
    except Exception as error:  # Jinja and transformers raise many types
        raise RequestError(f"messages do not fit the chat template: {error}") from error
    return {"prompt": text, "prompt_token_ids": _encode(tokenizer, text, add_special_tokens=False)}


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt={text[:40]!r} is not valid text ({error.reason}, character {error.start}): "
            "give UTF-8, decoded"
        ) from error
    found: list[int] = tokenizer.encode(text, **options)
    return found


def _is_list(value: Any) -> bool:
    """Bytes are numbers to Python, and text that nobody decoded to us."""
    return isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."

"""Prompts in dictionaries, with names for type checkers; the names are vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A text."""

    prompt: str
    cache_salt: NotRequired[str | None]
    """It shares cached prefixes only with prompts of the same salt."""


class TokensPrompt(TypedDict):
    """Token ids."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str | None]
    """The text that they are of, for outputs to show."""
    cache_salt: NotRequired[str | None]
    """As of a text."""

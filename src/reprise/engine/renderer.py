"""Which renderer a tokenizer's conversations go through."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.arguments import shown
from reprise.engine.deepseek_v4_chat import deepseek_v4_chat
from reprise.engine.template import ChatTemplate, Renderer
from reprise.errors import RequestError


def renderer_of(
    tokenizer: Any, chat_template: str | None, tools: Sequence[Mapping[str, Any]] | None
) -> Renderer:
    """What a conversation with these tools is rendered by: the template, the checkpoint's own, or
    what a checkpoint without one has in its place.

    Raises:
        RequestError: There is none, or it is no template.
    """
    if chat_template is not None and not isinstance(chat_template, str):
        raise RequestError(f"chat_template={shown(chat_template)}: give a Jinja template, or None")
    texts = getattr(tokenizer, "encoder_texts", None)
    if chat_template is None and texts is not None:
        return deepseek_v4_chat(texts)
    try:
        text: str = tokenizer.get_chat_template(chat_template, tools)
    except Exception as error:  # transformers raises many types
        raise RequestError(
            f"the tokenizer has no chat template; give chat_template= ({error})"
        ) from error
    return _of_text(text, tuple(tokenizer.special_tokens_map.items()))


@functools.lru_cache(maxsize=64)  # callers may make a new one for each request
def _of_text(text: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(text, dict(special_tokens))

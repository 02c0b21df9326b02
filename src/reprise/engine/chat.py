"""Conversations, as the OpenAI API means them, made into prompts by a model's chat template."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reprise.arguments import shown
from reprise.engine.messages import read_messages, read_tools
from reprise.engine.prompt import TokensPrompt, encode
from reprise.engine.renderer import renderer_of
from reprise.engine.template import PROVIDED, Renderer
from reprise.errors import RequestError

logger = logging.getLogger(__name__)

ContentFormat = Literal["auto", "string", "openai"]


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    chat_template_content_format: ContentFormat = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokensPrompt:
    """A conversation as the prompt that the model was trained on.

    Args:
        tokenizer: transformers' tokenizer, or None if none is loaded.
        messages: ``[{"role": "user", "content": "hi"}, ...]``, with all that the OpenAI API has for
            text and tool calls, and whatever else the template reads.
        chat_template: Jinja template, or the name of one of the tokenizer's; None: its own.
        chat_template_content_format: How the template gets a message's text: ``string``, ``openai``
            (a list of parts), or ``auto``: as it shows the text.
        add_generation_prompt: End the prompt where the assistant's answer begins.
        continue_final_message: End the prompt where the last message ends, for the model to go on.
        tools: ``[{"type": "function", "function": {"name": ..., "parameters": ...}}, ...]``.
        documents: To answer from, as the template reads them.
        chat_template_kwargs: Further variables of the template; the arguments here by their names
            too. Those that the template does not read change nothing and are logged once: callers
            of several models give ``enable_thinking`` to all of them.

    Raises:
        RequestError: The messages are malformed, the tokenizer has no chat template, or tools or
            documents were given that the template does not read.
    """
    if tokenizer is None:
        raise RequestError("messages need a tokenizer, and skip_tokenizer_init=True loads none")
    options: dict[str, Any] = {
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "tools": tools,
        "documents": documents,
    }
    variables = _mapping("chat_template_kwargs", chat_template_kwargs)
    options |= {name: variables.pop(name) for name in tuple(variables) if name in options}
    for name in ("add_generation_prompt", "continue_final_message"):
        if not isinstance(options[name], bool):
            raise RequestError(f"{name}={shown(options[name])}: give True or False")
    if options["add_generation_prompt"] and options["continue_final_message"]:
        raise RequestError(
            "continue_final_message=True and add_generation_prompt=True exclude each other: "
            "give add_generation_prompt=False"
        )
    if chat_template_content_format not in ("auto", "string", "openai"):
        raise RequestError(
            f"chat_template_content_format={shown(chat_template_content_format)}: "
            "give 'auto', 'string' or 'openai'"
        )
    options["tools"] = read_tools(options["tools"])
    options["documents"] = _documents(options["documents"])
    template = renderer_of(tokenizer, options.pop("chat_template"), options["tools"])
    for name in ("tools", "documents"):
        if options[name] is not None and name not in template.variables:
            raise RequestError(
                f"the chat template does not read {name!r}; its variables: {_names(template)}"
            )
    variables = _read_by(template, variables)
    read = read_messages(messages, template, chat_template_content_format)
    text = template.render(read, **options, **variables)
    return {"prompt": text, "prompt_token_ids": encode(tokenizer, text, add_special_tokens=False)}


def _read_by(template: Renderer, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the caller's variables that the template reads."""
    for name in variables:
        if not isinstance(name, str):
            raise RequestError(f"chat_template_kwargs has the key {shown(name)}: give strings")
        if name in _SET_HERE:
            raise RequestError(f"chat_template_kwargs has {name!r}, which is set here: drop it")
    unread = variables.keys() - template.variables
    if unread:
        _log_unread(_names(template), tuple(sorted(unread)))
    return {name: value for name, value in variables.items() if name not in unread}


_SET_HERE = PROVIDED | {"tokenize"}


@functools.lru_cache(maxsize=64)  # once, not for each request
def _log_unread(known: str, names: tuple[str, ...]) -> None:
    logger.warning(
        "chat_template_kwargs: the chat template does not read %s, so it changes nothing; its "
        "variables: %s",
        ", ".join(repr(each[:40]) for each in names),
        known,
    )


def _names(template: Renderer) -> str:
    return ", ".join(sorted(template.variables)) or "none"


def _documents(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise RequestError(f"documents={shown(value)}: give a list of dictionaries")
    return [_mapping(f"documents[{index}]", each) for index, each in enumerate(value)]


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise RequestError(f"{name}={shown(value)}: give a dictionary")
    return dict(value or {})

"""What a chat template reads, and in which form it shows what it is given."""

from __future__ import annotations

import functools
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.errors import RequestError

Message = dict[str, Any]

_TEXT = "kgqxwz"
_KEY, _VALUE, _NAME = "kgqxk", "kgqxv", "kgqxn"
"""In no template: where they come out, what they stand for would."""

_PROVIDED = {"messages", "raise_exception", "strftime_now"}
"""Variables that transformers sets."""

_OTHER = {"role": "user", "content": "x"}

_known: weakref.WeakKeyDictionary[Any, dict[str, ChatTemplate]] = weakref.WeakKeyDictionary()


def template_of(
    tokenizer: Any, chat_template: str | None, tools: Sequence[Mapping[str, Any]] | None
) -> ChatTemplate:
    """The template that a conversation with these tools is rendered by.

    Raises:
        RequestError: There is none, or it is no template.
    """
    if chat_template is not None and not isinstance(chat_template, str):
        raise RequestError(f"chat_template={chat_template!r}: give a Jinja template, or None")
    try:
        text: str = tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise RequestError(
            f"the tokenizer has no chat template; give chat_template= ({error})"
        ) from error
    templates = _known.setdefault(tokenizer, {})
    if text not in templates:
        if len(templates) > 32:  # of callers who make a new one for each request
            templates.clear()
        templates[text] = ChatTemplate(text, weakref.ref(tokenizer))
    return templates[text]


class ChatTemplate:
    """One template of a tokenizer.

    Templates differ in what they take: text as a string or as a list of parts, arguments of tool
    calls as JSON or as a dictionary, no content as None, as an empty string or not at all. What one
    does not take it drops without a word or prints as Python would, so each is asked by rendering
    small conversations, once.

    Args:
        text: In Jinja, with transformers' extensions.
        tokenizer: Renders it, with its special tokens.

    Raises:
        RequestError: It is no template.
    """

    def __init__(self, text: str, tokenizer: weakref.ref[Any]) -> None:
        from jinja2 import Environment, TemplateError, meta, nodes

        self._text = text
        self._tokenizer = tokenizer
        # transformers' own block, which changes nothing that is read.
        plain = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", text)
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        except TemplateError as error:
            raise RequestError(f"the chat template is not valid: {error}") from error
        self.variables = frozenset(meta.find_undeclared_variables(tree)) - _PROVIDED
        """Names that the one who renders it can give."""
        strings = (each.value for each in tree.find_all(nodes.Const))
        self.names = frozenset(each.attr for each in tree.find_all(nodes.Getattr)) | frozenset(
            each for each in strings if isinstance(each, str)
        )
        """What it may look up in messages, or compare roles with."""
        self._forms: dict[str, frozenset[str]] = {}

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt.

        Raises:
            RequestError: The messages do not fit the template.
        """
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "who renders has the tokenizer"
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self._text, **variables
            )
        except Exception as error:  # Jinja and transformers raise many types
            raise RequestError(f"messages do not fit the chat template: {error}") from error
        return text

    def content_forms(self, role: str) -> frozenset[str]:
        """``string`` and ``parts``: in which of them a message of this role shows its text."""
        if role not in self._forms:
            string, parts = (
                self._try(self._around(role, content))
                for content in (_TEXT, [{"type": "text", "text": _TEXT}])
            )
            forms = set()
            if _TEXT in string:
                forms.add("string")
            # A list that is printed as Python does contains the text as well.
            if _TEXT in parts and (parts == string or not forms):
                forms.add("parts")
            self._forms[role] = frozenset(forms)
        return self._forms[role]

    @functools.cached_property
    def tool_call_forms(self) -> tuple[bool, Message]:
        """Whether tool calls take their arguments as a dictionary, and what a message that has
        nothing but tool calls has for a content."""
        arguments = {_KEY: _VALUE}
        contents: list[Message] = [{}, {"content": None}, {"content": ""}]
        for form in (arguments, json.dumps(arguments)):
            for content in contents:
                shown = self._try([_OTHER, _call(content, form)])
                as_python, twice = f"'{_KEY}'", f'\\"{_KEY}'
                if (
                    all(each in shown for each in (_NAME, _KEY, _VALUE))
                    and as_python not in shown
                    and twice not in shown
                    and "None" not in shown
                ):
                    return isinstance(form, dict), content
        return True, {"content": ""}

    def _around(self, role: str, content: Any) -> list[Message]:
        """The shortest usual conversation with such a message."""
        message = {"role": role, "content": content}
        if role == "user":
            return [message]
        if role == "system":
            return [message, _OTHER]
        if role == "tool":
            as_dictionary, nothing = self.tool_call_forms
            call = _call(nothing, {} if as_dictionary else "{}")
            return [_OTHER, call, message | {"name": _NAME, "tool_call_id": "0"}]
        return [_OTHER, message, _OTHER]

    def _try(self, messages: Sequence[Message]) -> str:
        try:
            return self.render(messages)
        except RequestError:
            return ""


def _call(content: Message, arguments: Any) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": "0", "type": "function", "function": function}
    return {"role": "assistant", **content, "tool_calls": [call]}

"""What a chat template reads, and in which form it shows what it is given."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reprise.errors import RequestError
from reprise.jinja import parsed

Message = dict[str, Any]

_TEXT = "kgqxwz"
_KEY, _VALUE, _NAME = "kgqxk", "kgqxv", "kgqxn"
"""In no template: where they come out, what they stand for would."""

PROVIDED = {"messages", "raise_exception", "strftime_now"}
"""Variables that transformers sets."""

_CALL_ID = "kgqx00000"
"""Of the length that Mistral's templates insist on."""


@dataclass(frozen=True)
class ToolCallForm:
    """What a template makes tool calls of."""

    as_dictionary: bool
    """It takes arguments as a dictionary; otherwise as JSON."""
    no_content: Message | None
    """The part of a message that stands for no content; None: it must have some."""
    beside_content: bool
    """It shows tool calls of a message that has content."""
    unparsed: str | None = None
    """The argument that stands for arguments that are no JSON object; None: they are refused."""


class Renderer(Protocol):
    """Makes conversations into prompts: a chat template, or code that stands for one."""

    @property
    def variables(self) -> frozenset[str]:
        """Names that the renderer can give."""

    @property
    def names(self) -> frozenset[str]:
        """What it may look up in messages, or compare roles with."""

    @property
    def text(self) -> str:
        """The text in which the tags occur that its models write."""

    @property
    def tool_call_form(self) -> ToolCallForm | None:
        """How messages show their tool calls; None: they do not."""

    def content_forms(self, role: str) -> frozenset[str]:
        """``string`` and ``parts``: in which of them a message of this role shows its text."""

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt."""


class ChatTemplate:
    """One template.

    Templates differ in what they take: text as a string or as a list of parts, arguments of tool
    calls as JSON or as a dictionary, no content as None, as an empty string or not at all. What one
    does not take it drops without a word or prints as Python would, so each is asked by rendering
    small conversations, once.

    Args:
        text: In Jinja, with transformers' extensions.
        special_tokens: Of the tokenizer by name; the template may read them.

    Raises:
        RequestError: It is no template, or reads no messages: a file's name, mostly.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import meta, nodes

        self.text = text
        self._special_tokens = special_tokens
        tree = parsed(text)
        self.variables = frozenset(meta.find_undeclared_variables(tree)) - PROVIDED
        """Names that its renderer can give."""
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
        # Not the tokenizer's apply_chat_template: newer ones drop what is null, which templates of
        # DeepSeek ask for.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.text,
                **{**self._special_tokens, **variables},
            )
        except Exception as error:  # Jinja and transformers raise many types
            raise RequestError(f"messages do not fit the chat template: {error}") from error
        return str(rendered[0])

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
    def tool_call_form(self) -> ToolCallForm | None:
        """How messages show their tool calls, arguments and all; None: they do not."""
        arguments = {_KEY: _VALUE}
        nothings: list[Message] = [{}, {"content": None}, {"content": ""}]
        for form in (arguments, json.dumps(arguments)):
            shown = [self._shows_call(form, each) for each in (*nothings, {"content": _TEXT})]
            if any(shown):
                nothing = next(itertools.compress(nothings, shown), None)
                return ToolCallForm(isinstance(form, dict), nothing, shown[-1])
        return None

    def _shows_call(self, arguments: Any, content: Message) -> bool:
        shown = self._try([self._other, _call(content, arguments)])
        wanted = (_NAME, _KEY, _VALUE, content.get("content") or "")
        as_python, twice = f"'{_KEY}'", f'\\"{_KEY}'
        printed_null = "None" in shown and "None" not in self.text
        return all(each in shown for each in wanted) and not (
            as_python in shown or twice in shown or printed_null
        )

    @property
    def _other(self) -> Message:
        """A message that every conversation may begin with."""
        strings = self.content_forms("user") != {"parts"}
        return {"role": "user", "content": "x" if strings else [{"type": "text", "text": "x"}]}

    def _around(self, role: str, content: Any) -> list[Message]:
        """The shortest usual conversation with such a message."""
        message = {"role": role, "content": content}
        if role == "user":
            return [message]
        if role == "system":
            return [message, self._other]
        if role == "tool":
            form = self.tool_call_form or ToolCallForm(True, {"content": ""}, True)
            call = _call(form.no_content or {}, {} if form.as_dictionary else "{}")
            return [self._other, call, message | {"name": _NAME, "tool_call_id": _CALL_ID}]
        return [self._other, message, self._other]

    def _try(self, messages: Sequence[Message]) -> str:
        try:
            return self.render(messages)
        except RequestError:
            return ""


def _call(content: Message, arguments: Any) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", **content, "tool_calls": [call]}

"""What a request's text must be: a schema, a regular expression, one of some texts, a grammar."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reprise.arguments import is_whole, plain, plain_list, shown, takes_names
from reprise.errors import RequestError
from reprise.neutral import drop_neutral
from reprise.vllm_names import STRUCTURED

MAX_SOURCE = 1 << 18
"""Characters of a schema, an expression or a grammar."""
MAX_CHOICES = 4096


def _translate(arguments: dict[str, Any]) -> dict[str, Any]:
    return drop_neutral(arguments, STRUCTURED, _NAMES, "structured output option", RequestError)


@takes_names(_translate, RequestError)
@dataclass(kw_only=True)
class StructuredOutputsParams:
    """Names are vLLM's. Exactly one of the first six says what the text is.

    Raises:
        RequestError: None of them is given or several are, or a value has the wrong type.
    """

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema, as text or as what ``json.loads`` makes of it."""
    regex: str | None = None
    """A regular expression that the whole text matches."""
    choice: list[str] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """EBNF in the notation of GBNF; the text is what the rule ``root`` derives."""
    json_object: bool | None = None
    """True: the text is a JSON object, whatever is in it."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Free text with parts that are constrained, as xgrammar describes it."""
    disable_any_whitespace: bool = False
    """JSON has no white space but a space behind each comma and colon."""
    begin_after: int | None = None
    """(Ours.) What has to match begins behind this token, such as the one that ends a thought;
    before it anything is allowed. At once where it is among the last tokens of the prompt."""
    opened_by: int | None = None
    """(Ours.) With ``begin_after``: the token that opens what the other one ends. A text whose
    first token is another one has to match at once, unless the prompt ends with this one."""

    def __post_init__(self) -> None:
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise _invalid("json_object", self.json_object, "give True or leave it out")
        if self.json_object is False:
            self.json_object = None
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else "asks for nothing"
            raise RequestError(f"structured_outputs {found}: give one of {', '.join(KINDS)}")
        if not isinstance(self.disable_any_whitespace, bool):
            raise _invalid(
                "disable_any_whitespace", self.disable_any_whitespace, "give True or False"
            )
        for name in ("begin_after", "opened_by"):
            value = plain(getattr(self, name))
            if value is not None and (not is_whole(value) or value < 0):
                raise _invalid(name, value, "give a token id or None")
            setattr(self, name, value)
        if self.opened_by is not None and self.begin_after is None:
            raise _invalid("opened_by", self.opened_by, "give begin_after too")
        if self.json is not None:
            self.json = _document("json", self.json, (Mapping, bool))
        if self.structural_tag is not None:
            self.structural_tag = _document("structural_tag", self.structural_tag, (Mapping,))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _invalid(name, value, "give a text that is not empty")
            setattr(self, name, plain(value))
        if self.choice is not None:
            texts = plain_list(self.choice)
            if (
                not isinstance(texts, list)
                or not texts
                or not all(isinstance(each, str) and each for each in texts)
            ):
                raise _invalid("choice", self.choice, "give a list of strings, none of them empty")
            if len(texts) > MAX_CHOICES:
                raise RequestError(
                    f"structured_outputs.choice has {len(texts)} texts: give at most {MAX_CHOICES}"
                )
            self.choice = list(dict.fromkeys(texts))
        if len(self.source) > MAX_SOURCE:
            raise RequestError(
                f"structured_outputs.{self.kind} has {len(self.source)} characters: give at most "
                f"{MAX_SOURCE}"
            )

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def source(self) -> str:
        """What is given, as one text: equal texts of a kind ask for the same."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_NAMES = frozenset(each.name for each in dataclasses.fields(StructuredOutputsParams))


def _document(name: str, value: Any, kinds: tuple[type, ...]) -> str:
    """JSON as text, however it was given; a copy, so that its owner may change it."""
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            message = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise _invalid(name, value, f"it is no JSON: {message}") from error
    if not isinstance(value, kinds):
        remedy = "give an object as a dict or as JSON text"
        if callable(getattr(value, "model_json_schema", None)):
            remedy = "give what its model_json_schema() returns"
        raise _invalid(name, value, remedy)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(name, value, f"it cannot be written as JSON: {error}") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _invalid(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"structured_outputs.{name}={shown(value)}: {remedy}")

"""Command-line options made from the fields of a configuration dataclass.

A field's name becomes its flag, its type the option's type and the string below it the help text,
so that a field added to the dataclass is an option of every command at once.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import typer

_OF_NONE = re.compile(r"[;.] None: [^;.]*\.")
"""What a field's documentation says of None."""
_WHOLE_NUMBER = re.compile(r"(?P<digits>-?\d+(\.\d+)?)(?P<unit>[kmgtKMGT]?)", re.ASCII)


@dataclass(frozen=True)
class Special:
    """How a field differs from the rule; what is None follows the rule."""

    flags: tuple[str, ...] = ()
    help: str | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    """Text of one occurrence to a value."""
    repeated: bool = False
    """The option may be given more than once."""
    collect: Callable[[list[Any]], Any] = list
    """Values of a repeated option to the field's value."""


@dataclass(frozen=True)
class FieldOptions:
    """Options for fields of ``source``.

    Only what the user gives is passed on: the dataclass's own defaults stay the only ones.
    """

    source: type
    names: tuple[str, ...] | None = None
    """Fields to offer, in this order; None: all."""
    omit: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fields that the command does not take, and the remedy that the error names."""
    panels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Heading in the help to field names."""
    default_panel: str = "Engine"
    special: Mapping[str, Special] = field(default_factory=dict)
    shown_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that the command puts in the dataclass's place, for the help. None: no default."""

    def parameters(self) -> list[inspect.Parameter]:
        """The options as parameters of a typer command."""
        made: list[inspect.Parameter] = []
        for each in self._fields():
            made += self._switch(each) if self._is_switch(each) else [self._parameter(each)]
        return [*made, *(_refusal(name) for name in self.refused)]

    def take(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remove these options from a command's arguments; return those that the user gave."""
        given: dict[str, Any] = {}
        for name, remedy in self.refused.items():
            if arguments.pop(name) is not None:
                flag = "--" + name.replace("_", "-")
                raise typer.BadParameter(f"{flag} is not supported here; {remedy}")
        for each in self._fields():
            special = self.special.get(each.name, Special())
            value: Any = arguments.pop(each.name)
            if self._is_switch(each):
                # Two switches that are off unless given, see below.
                off = arguments.pop(f"no_{each.name}")
                value = (value or None) if not off else False
            if value is None or (special.repeated and not value):
                continue
            if special.repeated:
                value = special.collect(list(value))
            given[each.name] = value.value if isinstance(value, Enum) else value
        return given

    def _fields(self) -> list[dataclasses.Field[Any]]:
        found = {each.name: each for each in dataclasses.fields(self.source) if each.init}
        names = self.names or tuple(found)
        return [found[name] for name in names if name not in self.omit]

    def _is_switch(self, each: dataclasses.Field[Any]) -> bool:
        return _type_hints(self.source)[each.name] is bool

    def _switch(self, each: dataclasses.Field[Any]) -> list[inspect.Parameter]:
        """``--name`` and ``--no-name``; the help shows the one that changes the default."""
        default = bool(self.shown_defaults.get(each.name, each.default))
        parameters: list[inspect.Parameter] = []
        for name, value in ((each.name, True), (f"no_{each.name}", False)):
            option = typer.Option(
                "--" + name.replace("_", "-"),
                help=self._help(each, self.special.get(name, Special())),
                hidden=value == default,
                rich_help_panel=self._panel(each.name),
            )
            kind = inspect.Parameter.KEYWORD_ONLY
            annotation = Annotated[bool, option]
            parameters.append(inspect.Parameter(name, kind, default=False, annotation=annotation))
        return parameters

    def _parameter(self, each: dataclasses.Field[Any]) -> inspect.Parameter:
        special = self.special.get(each.name, Special())
        kind, parse = _option_type(each.name, _type_hints(self.source)[each.name])
        if special.parse is not None:
            kind, parse = str, special.parse
        if special.repeated:
            kind = list[kind]  # type: ignore[valid-type]
        option = typer.Option(
            *(special.flags or ("--" + each.name.replace("_", "-"),)),
            help=self._help(each, special),
            metavar=special.metavar,
            parser=parse,
            rich_help_panel=self._panel(each.name),
            show_default=False,
        )
        return inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Optional[kind], option],  # noqa: UP045 - kind is a value
        )

    def _panel(self, name: str) -> str:
        return next((p for p, names in self.panels.items() if name in names), self.default_panel)

    def _help(self, each: dataclasses.Field[Any], special: Special) -> str:
        text, default = special.help, self.shown_defaults.get(each.name, each.default)
        if text is None:
            text = _documentation(self.source).get(each.name, "")
            # In an option's help, None is what holds when the option is absent.
            text = text.replace("``", "")
            if default is not None:
                text = _OF_NONE.sub(".", text)  # the command puts something else in its place
            text = text.replace("; None: ", "; default: ").replace(". None: ", ". Default: ")
        text = text.replace("[", "\\[")
        if default is None or default is dataclasses.MISSING or isinstance(default, bool):
            return text
        return f"{text} [dim]\\[default: {default}][/dim]"


def _refusal(name: str) -> inspect.Parameter:
    """An option that no help shows."""
    option = typer.Option("--" + name.replace("_", "-"), hidden=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[str | None, option])


def choice(name: str, values: tuple[str, ...]) -> type[Enum]:
    """An option type with these values."""
    return Enum(name, {value: value for value in values})  # type: ignore[return-value]


def json_object(text: str) -> dict[str, Any]:
    """Parse an option's value.

    Raises:
        typer.BadParameter: It is not a JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object, such as '{{\"name\": 1}}'")
    return value


def whole_number(text: str) -> int:
    """Parse a number as vLLM's options take it: 4096, 32k (32,000), 1.5k (1,500), 32K (32,768).

    Raises:
        typer.BadParameter: It is none.
    """
    found = _WHOLE_NUMBER.fullmatch(text.strip())
    if found is not None:
        digits, unit = found["digits"], found["unit"]
        power = "kmgt".find(unit.lower()) + 1 if unit else 0
        value = Fraction(digits) * (1024 if unit.isupper() else 1000) ** power
        if value.denominator == 1 and ("." not in digits or unit.islower()):
            return int(value)
    raise typer.BadParameter(
        f"{text!r} is no whole number: give one such as 32768, 32K (times 1,024) or 32k "
        "(times 1,000); M, G, T and m, g, t as well"
    )


def _option_type(name: str, hint: Any) -> tuple[Any, Callable[[str], Any] | None]:
    """The type of an option for a field of type ``hint``, and its parser if it needs one."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [each for each in get_args(hint) if each is not type(None)]
        # Of ``str | Sequence[str]`` and the like, the plain one.
        hint = next((each for each in members if isinstance(each, type)), members[0])
    if get_origin(hint) is Literal:
        return choice(name, get_args(hint)), None
    if hint in (str, int, float):
        return hint, None
    return str, json_object


@functools.cache
def _type_hints(source: type) -> dict[str, Any]:
    return get_type_hints(source)


@functools.cache
def _documentation(source: type) -> dict[str, str]:
    """Field name to the string literal that follows the field in the class's source."""
    try:
        # All of the module: to cut the class out, Python reads it token by token.
        tree = ast.parse(inspect.getsource(sys.modules[source.__module__]))
    except (OSError, TypeError, SyntaxError):
        return {}
    classes = (each for each in ast.walk(tree) if isinstance(each, ast.ClassDef))
    body = next((each.body for each in classes if each.name == source.__name__), [])
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found

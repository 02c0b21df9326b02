"""Arguments that may ask for nothing: accepted at such values, else refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from reprise.arguments import plain, shown, unknown_names

ANY_FLAG = (True, False)


@dataclass(frozen=True)
class Group:
    """Names that one reason is about."""

    instead: str
    """What to say at other values."""
    neutral: Mapping[str, tuple[Any, ...]]
    """Name to the values, besides None, at which it asks for nothing."""


def drop_neutral(
    given: Mapping[str, Any],
    groups: Collection[Group],
    known: Collection[str],
    what: str,
    error: type[Exception],
    also: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments without those that ask for nothing.

    Args:
        given: Keyword arguments.
        groups: Other names that may be among them.
        known: Names that mean something here.
        what: What an argument is called in errors.
        error: What to raise.
        also: Names that mean something too and that errors do not recommend.
    """
    left: dict[str, Any] = {}
    unknown = []
    for name, value in given.items():
        if name in known or name in also:
            left[name] = value
            continue
        group = next((each for each in groups if name in each.neutral), None)
        if group is None:
            unknown.append(name)
        elif not is_neutral(value, group.neutral[name]):
            raise error(f"{name}={shown(value)}: {group.instead}")
    if unknown:
        raise error(unknown_names(what, sorted(unknown), known))
    return left


def is_neutral(value: Any, neutral: Collection[Any]) -> bool:
    """Whether the value is None or one of the neutral ones; 1 is not True."""
    value = plain(value)
    if value is None:
        return True
    if isinstance(value, list) and value and all(each is None for each in value):
        return True  # one for each prompt
    flag = isinstance(value, bool)
    return any(isinstance(each, bool) == flag and bool(each == value) for each in neutral)

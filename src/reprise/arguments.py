"""What callers hand in: numbers of any make, and names that are almost right."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
_PLAIN = frozenset({type(None), bool, int, float, str, list, dict})
_EXACTLY: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__), (float, float.__float__), (str, str.__str__),
)  # fmt: skip
"""What a class of a caller's own, such as an enumeration, cannot answer otherwise."""


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's numbers and lists, numbers and texts of a
    caller's own classes, which no other process knows, as Python's; others as they are."""
    if type(value) in _PLAIN:
        return value
    convert = None if isinstance(value, type | memoryview) else getattr(value, "tolist", None)
    if callable(convert):
        return convert()
    for kind, exactly in _EXACTLY:
        if isinstance(value, kind):
            return exactly(value)
    return value


def plain_list(value: Any) -> Any:
    """As :func:`plain`, the elements of a list or a similar collection too."""
    value = plain(value)
    if isinstance(value, list | tuple | set | frozenset | range):
        return list(value) if all(type(each) is int for each in value) else list(map(plain, value))
    return value


def plain_path(value: Any) -> Any:
    """Paths of any make as text; others as they are."""
    return os.fsdecode(value) if isinstance(value, os.PathLike) else plain(value)


def is_whole(value: object) -> bool:
    """A whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """A number that float holds; NaN, the infinities, True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def shown(value: object, limit: int = 200) -> str:
    """The value for an error's message, which is read by people, whatever a caller handed in."""
    try:
        text = repr(value)
    except Exception:  # a number of thousands of digits, say, or a caller's own class
        text = f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def unknown_names(what: str, unknown: Iterable[str], known: Collection[str]) -> str:
    """The message for names that do not exist, with the one that was probably meant."""
    parts = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        parts.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return f"unknown {what} {', '.join(parts)}; known: {', '.join(sorted(known))}"


def takes_names(
    translate: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception]
) -> Callable[[type[T]], type[T]]:
    """For a dataclass whose fields all have defaults: check and translate the names that its
    constructor is called with.

    Args:
        translate: Keyword arguments as given to keyword arguments of fields.
        error: What to raise for arguments without a name.
    """

    def decorate(cls: type[T]) -> type[T]:
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        defaults = {
            each.name: each.default for each in fields if each.default is not dataclasses.MISSING
        }
        makers = {
            each.name: each.default_factory
            for each in fields
            if each.default_factory is not dataclasses.MISSING
        }

        @functools.wraps(cls.__init__)
        def __init__(self: Any, *unnamed: Any, **arguments: Any) -> None:
            if unnamed:
                raise error(
                    f"{cls.__name__}({', '.join(map(repr, unnamed))}): give each value's name"
                )
            # Field by field, as dataclasses do it, takes longer than all checks of most requests.
            values = vars(self)
            values.update(defaults)
            for name, make in makers.items():
                values[name] = make()
            values.update(translate(arguments))
            self.__post_init__()

        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate

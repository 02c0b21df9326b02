"""Calls in a text, told from what stands around them, as the text comes.

However a text is cut into pieces, the same comes out: what is decided is decided by the text alone,
and what is not decided is held back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

MOST_HEADER = 1 << 12
"""Characters of a call in which its name ends, or its first key: each piece of a text is looked at
together with all before it up to there."""


class Event(NamedTuple):
    """What is certain of a text."""

    kind: Literal["content", "call", "arguments"]
    text: str
    """Of the content, or the next piece of the newest call's arguments; of a call its name."""


class ToolParser(ABC):
    """Takes a text piece by piece.

    Args:
        tools: Of the request: parameters' JSON schemas by the tools' names.
    """

    needs_special_tokens = False
    """The tags of its format may be special tokens, which texts do not have unless asked."""

    def __init__(self, tools: dict[str, Any]) -> None:
        self.tools = tools
        self.num_calls = 0
        self._held = ""
        self._ended = False
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """What is certain with this piece."""
        self._held += text
        return self._run()

    def finish(self) -> list[Event]:
        """No piece follows."""
        self._ended = True
        return self._run()

    def _run(self) -> list[Event]:
        while self._step():
            pass
        found, self._events = self._events, []
        return [each for each in found if each.kind == "call" or each.text]

    @abstractmethod
    def _step(self) -> bool:
        """Take something from what is held; whether to look again."""

    def _content(self, text: str) -> None:
        self._events.append(Event("content", text))

    def _call(self, name: str) -> None:
        self.num_calls += 1
        self._events.append(Event("call", name))

    def _arguments(self, text: str) -> None:
        self._events.append(Event("arguments", text))


class TaggedParser(ToolParser):
    """Of a format whose calls begin with a tag and end with another one.

    White space between content and a tag belongs to neither.
    """

    begin: str
    """Of a call, or of the first one."""

    def __init__(self, tools: dict[str, Any]) -> None:
        super().__init__(tools)
        self._inside = False
        self._space = ""
        """White space before the tag."""
        self._called = False
        """A call came before: what follows is content only if there is more than white space."""

    def _step(self) -> bool:
        return self._step_inside() if self._inside else self._step_outside()

    @abstractmethod
    def _step_inside(self) -> bool:
        """As :meth:`_step`, behind :attr:`begin`; :meth:`_leave` when the call is over."""

    def _leave(self, rest: str) -> None:
        self._held, self._inside, self._called = rest, False, True

    def _is_no_call(self, body: str, rest: str) -> None:
        """What looked like a call, up to ``rest``, is content."""
        self._content(self._space + self.begin + body)
        self._leave(rest)
        self._called = False

    def _step_outside(self) -> bool:
        held = self._held.lstrip() if self._called else self._held
        place = held.find(self.begin)
        if place >= 0:
            text = held[:place].rstrip()
            self._content(text)
            self._space = held[len(text) : place]
            self._held, self._inside = held[place + len(self.begin) :], True
            self._entered()
            return True
        sure = len(held)
        if not self._ended:
            sure -= beginning_of(held, self.begin)
            sure = len(held[:sure].rstrip())
        if sure:
            self._content(held[:sure])
            self._called = False
        self._held = held[sure:]
        return False

    def _entered(self) -> None:
        """A call begins."""


class ListParser(TaggedParser):
    """Of a format whose calls stand, one after the other, between two tags for all."""

    end: str
    """Of the list."""
    first: str
    """How each call begins."""

    def _entered(self) -> None:
        self._calls_before = self.num_calls

    def _step_between(self) -> bool:
        """As :meth:`_step`, where no call is under way and none has begun as it should: at the
        list's end, or at what is no call."""
        held = self._held.lstrip()
        if held.startswith(self.end):
            self._leave(held[len(self.end) :])
            return True
        may_come = held.startswith(self.first) or any(
            each.startswith(held) for each in (self.first, self.end)
        )
        if not may_come or (self._ended and held):
            if self.num_calls > self._calls_before:
                self._leave(self._held)
            else:
                self._is_no_call("", self._held)
            return True
        return False


def beginning_of(text: str, tag: str) -> int:
    """Characters at the end of ``text`` that ``tag`` may begin with."""
    for count in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:count]):
            return count
    return 0


class JsonValue:
    """Finds the end of a JSON value in a text that comes piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._began = False
        self.ended = False

    def feed(self, text: str) -> int:
        """How many characters of the next piece belong to the value."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    if not self._depth:
                        return self._end(place + 1)
            elif character == '"':
                self._in_string = self._began = True
            elif character == "<":  # of a tag: the value is broken off
                return self._end(place)
            elif character in "{[":
                self._depth += 1
                self._began = True
            elif character in "}]":
                if not self._depth:  # of a number, say, in an object that ends
                    return self._end(place)
                self._depth -= 1
                if not self._depth:
                    return self._end(place + 1)
            elif not self._depth:
                if character == "," or (self._began and character.isspace()):
                    return self._end(place)
                self._began = True
        return len(text)

    def _end(self, count: int) -> int:
        self.ended = True
        return count

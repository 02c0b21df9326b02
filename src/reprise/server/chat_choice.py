"""One of the completions of a conversation, while it grows: thoughts, calls and answer apart."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from reprise.server.logprobs import Position
from reprise.server.reasoning import Part, Splitter, ThoughtTokens
from reprise.server.tools.choice import ToolUse


class Choice:
    """One of the completions, while it grows.

    Args:
        splitter: Of its text; None: all of it is the answer.
        use: How calls are read; None: there are none.
    """

    def __init__(self, splitter: Splitter | None, use: ToolUse | None) -> None:
        self._use = use
        self._reader = None if use is None else use.reader()
        self.num_calls = 0
        self._dropping = self._seen_call = False
        self.begun = False
        """The chunk with the role was sent."""
        self.positions: list[Position] = []
        self._splitter = splitter
        self.thoughts = None if splitter is None else ThoughtTokens(splitter)

    def feed(self, text: str) -> list[tuple[str, str]]:
        if self._splitter is None:
            return self._read([("content", text)] if text else [])
        return self._read(self._splitter.feed(text))

    def _read(self, parts: Sequence[Part], ended: bool = False) -> list[tuple[str, str]]:
        """The parts, with the calls that are in the answer."""
        if self._reader is None or self._use is None:
            return list(parts)
        found: list[tuple[str, str]] = []
        for kind, text in parts:
            if kind == "content":
                found += self._reader.feed(text)
            else:
                found.append((kind, text))
        if ended:
            found += self._reader.finish()
        if self._use.parallel:
            return found
        return [each for each in found if not self._beyond_first(each[0])]

    def _beyond_first(self, kind: str) -> bool:
        """Whether it is of a call behind the first one, where only one is wanted."""
        if kind == "call":
            self._dropping, self._seen_call = self._seen_call, True
        return self._dropping and kind in ("call", "arguments")

    def new_call(self, name: str) -> dict[str, Any]:
        """One more call, whose arguments are still to come."""
        self.num_calls += 1
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def finish_reason(self, finish: str) -> str:
        """The chat API's."""
        called = self.num_calls and self._use is not None and not self._use.named
        return "tool_calls" if finish == "stop" and called else finish

    @property
    def thinks(self) -> bool:
        """What follows is a thought, as far as is known."""
        return self._splitter is not None and self._splitter.thinking

    @property
    def answers(self) -> bool:
        """All that follows is answer."""
        if self._splitter is None or self.thoughts is None:
            return True
        return self._splitter.state == "content" and self.thoughts.settled

    def finish(self) -> list[tuple[str, str]]:
        return self._read([] if self._splitter is None else self._splitter.finish(), ended=True)

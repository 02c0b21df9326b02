"""What a model thinks, split from what it answers, as the text comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
PARSERS = ("none", "qwen3", "deepseek_r1")

Kind = Literal["content", "reasoning"]
Part = tuple[Kind, str]


def thinks_from_start(parser: str, prompt_tail: str, unfinished: str | None) -> bool:
    """Whether the first token of an output is a thought.

    Args:
        parser: One of :data:`PARSERS`.
        prompt_tail: The end of the prompt: newer templates open the block there, or close an empty
            one.
        unfinished: Message that the output goes on with.
    """
    if unfinished is not None and OPEN in unfinished:
        return CLOSE not in unfinished
    if CLOSE in prompt_tail and OPEN not in prompt_tail.rpartition(CLOSE)[2]:
        return False
    return prompt_tail.rstrip().endswith(OPEN) or parser == "deepseek_r1"


def begins_behind_thoughts(
    parser: str, think_ids: Sequence[int | None], unfinished: str | None
) -> dict[str, int | None]:
    """Where what an answer has to match begins, as :class:`reprise.StructuredOutputsParams` says
    it: a model thinks as it likes, and one that does not think answers at once.

    Args:
        parser: As of :func:`thinks_from_start`.
        think_ids: Of the tags as tokens; None: it is none.
        unfinished: As of :func:`thinks_from_start`.
    """
    opens, closes = think_ids
    answers = unfinished is not None and CLOSE in unfinished
    if parser == "none" or closes is None or answers:
        return {}
    if parser == "deepseek_r1" or (unfinished is not None and OPEN in unfinished):
        opens = None
    return {"begin_after": closes, "opened_by": opens}


class Splitter:
    """Takes a text piece by piece. How it is cut into pieces makes no difference to what comes out.

    White space around the tags belongs to neither side: it is not given out.

    Args:
        thinking: The text begins within a block.
    """

    def __init__(self, thinking: bool) -> None:
        self.state: Literal["start", "reasoning", "between", "content"] = (
            "reasoning" if thinking else "start"
        )
        self._held = ""
        """What may be a part of a tag, or white space beside one."""
        self._began = False
        """Something of this block was given out."""
        self._may_open = thinking
        """Some models write the tag behind a prompt that ends with it."""
        self._fed = 0
        """Bytes of the text (UTF-8), as long as a thought may end."""
        self.thought_end: int | None = None
        """Bytes of the text up to the end of its thought, the tag included; None: it has none, or
        none that has ended."""

    @property
    def thinking(self) -> bool:
        """Within a block."""
        return self.state == "reasoning"

    def feed(self, text: str) -> list[Part]:
        """What is certain with this piece."""
        self._held += text
        if self.state in ("start", "reasoning"):
            self._fed += len(text.encode())
        parts: list[Part] = []
        while self._step(parts):
            pass
        return [each for each in parts if each[1]]

    def finish(self) -> list[Part]:
        """No piece follows."""
        rest, self._held = self._held, ""
        if self.state == "reasoning":
            if self._may_open:
                rest = rest.lstrip().removeprefix(OPEN)
            rest = rest if self._began else rest.lstrip()
            return [("reasoning", rest.rstrip())] if rest.strip() else []
        if self.state == "between":
            rest = rest.lstrip("\n")
        return [("content", rest)] if rest else []

    def _step(self, parts: list[Part]) -> bool:
        """Take from what is held; whether to look again."""
        held = self._held
        if self.state == "content":
            parts.append(("content", held))
            self._held = ""
            return False
        if self.state == "start":
            begun = held.lstrip()
            if begun.startswith(OPEN):
                self.state, self._held = "reasoning", begun[len(OPEN) :]
                return True
            if OPEN.startswith(begun):
                return False  # also where there is nothing yet
            self.state = "content"
            return True
        if self.state == "between":
            self._held = held.lstrip("\n")
            if not self._held:
                return False
            self.state = "content"
            return True
        return self._think(parts)

    def _think(self, parts: list[Part]) -> bool:
        held = self._held
        if not self._began:
            held = held.lstrip()
        if self._may_open:
            if OPEN.startswith(held) and held != OPEN:
                return False
            self._may_open = False
            held = held.removeprefix(OPEN).lstrip()
        thought, found, rest = held.partition(CLOSE)
        if found:
            parts.append(("reasoning", thought.rstrip()))
            self.state, self._held = "between", rest
            self.thought_end = self._fed - len(rest.encode())
            return True
        sure = len(held) - _beginning_of(held, CLOSE)
        sure = len(held[:sure].rstrip())
        if sure:
            parts.append(("reasoning", held[:sure]))
            self._began = True
        self._held = held[sure:]
        return False


class ThoughtTokens:
    """Counts the tokens of an output that are thoughts, the tags included. How they are cut into
    pieces makes no difference to the count.

    Args:
        splitter: Of the text.
    """

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._sizes: list[int] = []
        self._bytes = 0
        """Of the tokens that are known to be thoughts."""
        self.count = 0
        """As far as the splitter knows."""
        self.settled = False
        """No later token is a thought."""

    def add(self, sizes: Sequence[int]) -> None:
        """The next tokens, whose text the splitter has as far as it is known.

        Args:
            sizes: Bytes that each adds to the text.
        """
        if self.settled:
            return
        self._sizes += sizes
        end = self._splitter.thought_end
        if end is None:
            self.count = len(self._sizes) if self._splitter.thinking else 0
            self.settled = self._splitter.state == "content"
            return
        if self._bytes == 0:
            self.count = 0
        while self._bytes < end and self.count < len(self._sizes):
            self._bytes += self._sizes[self.count]
            self.count += 1
        self.settled = self._bytes >= end


def _beginning_of(text: str, tag: str) -> int:
    """Characters at the end of ``text`` that ``tag`` may begin with."""
    for count in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:count]):
            return count
    return 0

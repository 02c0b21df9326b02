"""Log probabilities in the two forms of the OpenAI API.

On the wire a position is a list of ``[id, logprob, text, bytes or None]``, the chosen token first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Position = Sequence[Sequence[Any]]


def chat_logprobs(positions: Sequence[Position], wanted: int, as_ids: bool) -> list[dict[str, Any]]:
    """``choices[].logprobs.content``.

    Args:
        positions: One a token.
        wanted: ``top_logprobs``.
        as_ids: ``return_tokens_as_token_ids``.
    """
    return [
        {
            **_entry(position[0], as_ids),
            "top_logprobs": [_entry(each, as_ids) for each in _ranked(position)[:wanted]],
        }
        for position in positions
    ]


def _entry(token: Sequence[Any], as_ids: bool) -> dict[str, Any]:
    number, logprob, text, pieces = token
    return {
        "token": f"token_id:{number}" if as_ids else text,
        "logprob": logprob,
        "bytes": pieces if pieces is not None else list(text.encode()),
    }


def _ranked(position: Position) -> list[Sequence[Any]]:
    return sorted(position, key=lambda each: -each[1])


def fewer(positions: Sequence[Position | None], wanted: int) -> list[Position | None]:
    """Each with its token and at most so many of the likeliest, where the engine was asked for
    more."""
    return [
        each if each is None or len(each) <= wanted else _with_likeliest(each, wanted)
        for each in positions
    ]


def _with_likeliest(position: Position, wanted: int) -> Position:
    others = _ranked(position)[:wanted]
    return [position[0], *(each for each in others if each is not position[0])]


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion, whose offsets go on from chunk to chunk.

    Args:
        as_ids: ``return_tokens_as_token_ids``.
    """

    def __init__(self, as_ids: bool) -> None:
        self._as_ids = as_ids
        self._offset = 0

    def take(
        self, positions: Sequence[Position | None], first: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """Take the log probabilities of the next tokens.

        Args:
            positions: One a token; None for a prompt's first one.
            first: Id and text of that one.
        """
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for position in positions:
            number, text = first if position is None else (position[0][0], position[0][2])
            tokens.append(self._name(number, text))
            offsets.append(self._offset)
            self._offset += len(text)
            logprobs.append(None if position is None else position[0][1])
            tops.append(None if position is None else self._top(position))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, position: Position) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, logprob, text, _ in _ranked(position):
            found.setdefault(self._name(number, text), logprob)  # of equal texts the likeliest
        return found

    def _name(self, number: int, text: str) -> str:
        return f"token_id:{number}" if self._as_ids else text


def prompt_logprobs(positions: Sequence[Position | None]) -> list[dict[str, Any] | None]:
    """``prompt_logprobs``, vLLM's extra: token id to its log probability and text."""
    return [
        None
        if position is None
        else {
            str(number): {"logprob": logprob, "decoded_token": text}
            for number, logprob, text, _ in position
        }
        for position in positions
    ]

"""Conversations that are too long, without their oldest turns."""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reprise.engine.prompt import TokensPrompt

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]


def fitting(messages: Messages, most: int, render: Callable[[Messages], TokensPrompt]) -> Any:
    """A prompt of the newest turns, as many as there is room for.

    Whole turns are left out, from a user's message to the next one's, and of the last turn an
    assistant's messages with the answers of their tools. What stands before the first turn
    (instructions) and the last user's message stay.

    Args:
        messages: Of the conversation.
        most: Tokens of the prompt.
        render: Makes a prompt of messages.

    Returns:
        What ``render`` gives; longer than ``most`` where even the shortest is.
    """
    choices = shortened(messages)
    prompt = functools.cache(lambda number: render(choices[number]))

    def fits(number: int) -> bool:
        return len(prompt(number)["prompt_token_ids"]) <= most

    if fits(0):
        return prompt(0)
    # The first that fits, since each is shorter than the one before.
    kept = min(1 + bisect.bisect_left(range(1, len(choices)), True, key=fits), len(choices) - 1)
    dropped = len(messages) - len(choices[kept])
    if dropped:
        logger.info(
            "truncation=auto: the oldest %d of %d messages are left out, for a prompt of at most "
            "%d tokens", dropped, len(messages), most,
        )  # fmt: skip
    return prompt(kept)


def shortened(messages: Messages) -> list[Messages]:
    """All messages, and then what is left without more and more of the oldest turns."""
    roles = [each.get("role") for each in messages]
    begin = 0
    while begin < len(roles) and roles[begin] in ("system", "developer"):
        begin += 1
    head = messages[:begin]
    users = [place for place in range(begin, len(roles)) if roles[place] == "user"]
    found: list[Messages] = [messages]
    found += [[*head, *messages[place:]] for place in users if place > begin]
    if users:
        last = users[-1]
        rounds = [place for place in range(last + 1, len(roles)) if roles[place] == "assistant"]
        found += [[*head, messages[last], *messages[place:]] for place in rounds[1:]]
    return found

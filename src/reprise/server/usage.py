"""What a request has cost, in tokens."""

from __future__ import annotations

from typing import Any

import orjson


class Usage:
    """Counts of one reply, over its prompts and choices."""

    __slots__ = ("cached", "completion", "prompt", "reasoning")

    def __init__(self) -> None:
        self.prompt = 0
        self.completion = 0
        self.cached = 0
        self.reasoning: int | None = None
        """None: nothing was split."""

    def to_json(self) -> bytes:
        """What :meth:`to_dict` gives."""
        return orjson.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """As the OpenAI API has it."""
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.reasoning is not None:
            found["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return found

"""What replies of both kinds of generation have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from reprise.server.errors import ApiError, error_event
from reprise.server.usage import Usage

DONE = b"data: [DONE]\n\n"


class Reply(ABC):
    """Counts, and what the log says."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.finish_reasons: dict[int, str] = {}
        self.end: Mapping[str, Any] | None = None
        """Times of the request that ended last, in seconds."""
        self.usage_each = False
        """Every chunk of a stream has the usage so far."""
        self.complete = False
        """The stream's last chunk was made."""

    @abstractmethod
    def chunks(self, news: list[tuple[int, list[Any]]]) -> bytes:
        """The chunks of a stream.

        Args:
            news: As of :meth:`reprise.server.caller.Caller.take`.

        Raises:
            EngineRefusal: A request was aborted.
        """

    def around(self, number: int) -> list[bytes] | None:
        """What stands around the text of a chunk, and its usage if it has that, where all texts
        that come alone are such a chunk each from now on. None: they are not, as yet.

        Args:
            number: Of the request.
        """
        return None

    def begin(self) -> bytes:
        """What a stream has before its first news."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """How a stream ends whose status is out."""
        return error_event(error) + DONE

    async def announce(self) -> None:
        """A stream of it begins: before its caller has anything of it."""
        return

    settles = False
    """:meth:`settle` does something."""

    async def settle(self) -> None:
        """The output is complete; called before its caller has the end of it."""
        return

    def left(self) -> None:
        """The caller has all of the output, or is gone."""
        return

    def running_usage(self) -> bytes | None:
        """The usage for a chunk."""
        return self.final_usage() if self.usage_each else None

    def final_usage(self) -> bytes:
        return self.usage.to_json()

    def told(self) -> dict[str, Any]:
        """A line for the log."""
        found: dict[str, Any] = {
            "prompt_tokens": self.usage.prompt,
            "completion_tokens": self.usage.completion,
        }
        for name in ("queue", "first_token"):
            if self.end is not None and self.end[name] is not None:
                found[name] = round(self.end[name], 4)
        if self.finish_reasons:
            found["finish_reason"] = ",".join(sorted(set(self.finish_reasons.values())))
        return found

"""Responses that clients may go on from, as long as there is room. They are with the engine, so
that every HTTP process finds them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from reprise.arguments import shown
from reprise.server.errors import ApiError


class Stored(NamedTuple):
    """One response."""

    response: str
    """JSON."""
    items: str = "[]"
    """JSON: the conversation up to its end."""
    num_inputs: int = 0
    """How many of the items it was computed from; the others are its output."""

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.response) + len(self.items) + 200


class ResponseStore:
    """The least recently used are forgotten first. Those under way are known too, and cost nothing
    of the limit: there are no more of them than requests.

    Args:
        limit: Bytes of all together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._found: OrderedDict[str, Stored] = OrderedDict()
        self._running: dict[str, Stored] = {}

    def __len__(self) -> int:
        return len(self._found) + len(self._running)

    def begin(self, name: str, response: str) -> None:
        """Take in a response that is under way."""
        self._running[name] = Stored(response)

    def put(self, name: str, entry: Stored) -> None:
        """One has ended; what is larger than the limit is not kept."""
        self.forget([name])
        if entry.size > self.limit:
            return
        self._found[name] = entry
        self.size += entry.size
        while self.size > self.limit:
            self.size -= self._found.popitem(last=False)[1].size

    def get(self, name: str) -> Stored | None:
        """None: it is not known, or not any more."""
        if name in self._found:
            self._found.move_to_end(name)
            return self._found[name]
        return self._running.get(name)

    def delete(self, name: str) -> bool:
        """Drop a response; returns whether it was known."""
        entry = self._found.pop(name, None)
        if entry is not None:
            self.size -= entry.size
        return entry is not None

    def forget(self, names: Iterable[str]) -> None:
        """Drop responses under way, which are not kept."""
        for each in names:
            self._running.pop(each, None)

    def answer(self, action: str, name: str, **more: Any) -> Any:
        """A question of an HTTP process: a method here, whose arguments and answers are JSON."""
        if action == "put":
            return self.put(name, Stored(**more))
        if action == "forget":
            return self.forget([name])
        if action == "get":
            found = self.get(name)
            return found and list(found)
        if action == "begin":
            return self.begin(name, **more)
        assert action == "delete"
        return self.delete(name)


def not_found(name: str, param: str | None = None) -> ApiError:
    """There is no such response."""
    code = None if param is None else "previous_response_not_found"
    return ApiError(
        404, f"Response with id {shown(name)} not found: it was never stored, or is forgotten "
        "(response_store_bytes)", code=code, param=param,
    )  # fmt: skip

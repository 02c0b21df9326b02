"""Responses that clients may go on from, as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import orjson

from reprise.arguments import shown
from reprise.server.errors import ApiError


class Stored(NamedTuple):
    """One response."""

    response: bytes
    """JSON."""
    items: bytes
    """JSON: the conversation up to its end."""


class ResponseStore:
    """The least recently used are forgotten first.

    Args:
        limit: Bytes of all together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._found: OrderedDict[str, Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def put(self, name: str, response: dict[str, Any], items: list[Any]) -> None:
        """Keep one; what is larger than the limit is not kept."""
        entry = Stored(orjson.dumps(response), orjson.dumps(items))
        if _size(entry) > self.limit:
            return
        self._found[name] = entry
        self.size += _size(entry)
        while self.size > self.limit:
            self.size -= _size(self._found.popitem(last=False)[1])

    def get(self, name: str, param: str | None = None) -> Stored:
        """
        Raises:
            ApiError: It is not known, or not any more.
        """
        if name not in self._found:
            raise not_found(name, param)
        self._found.move_to_end(name)
        return self._found[name]

    def delete(self, name: str) -> None:
        """
        Raises:
            ApiError: As :meth:`get`.
        """
        self.size -= _size(self.get(name))
        del self._found[name]


def not_found(name: str, param: str | None = None) -> ApiError:
    """There is no such response."""
    code = None if param is None else "previous_response_not_found"
    return ApiError(
        404, f"Response with id {shown(name)} not found: it was never stored, or is forgotten "
        "(response_store_bytes)", code=code, param=param,
    )  # fmt: skip


def _size(entry: Stored) -> int:
    return len(entry.response) + len(entry.items) + 200

"""``GET /v1/responses/ID/input_items``: what a response was computed from, page by page."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from reprise.arguments import shown
from reprise.server.errors import ApiError

_PREFIXES = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
MOST, USUAL = 100, 20
"""Items of a page."""


def with_ids(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items as they are listed: each has an id, and a message its parts."""
    return [_with_id(each) for each in items]


def _with_id(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    name = f"{_PREFIXES.get(kind, 'msg')}_{secrets.token_hex(16)}"
    found = {"id": name, **item, "type": kind}
    if kind == "message" and isinstance(item.get("content"), str):
        said = item["role"] == "assistant"
        part: dict[str, Any] = {"type": "output_text" if said else "input_text"}
        part["text"] = item["content"]
        if said:
            part["annotations"] = []
        found["content"] = [part]
    if kind != "reasoning":
        found.setdefault("status", "completed")
    return found


def page(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """A part of the list.

    Args:
        items: All of them, the oldest first.
        query: ``limit``, ``order`` (``desc``, which is usual: the newest first; ``asc``), ``after``
            (the id of the last item of the page before).

    Raises:
        ApiError: One of them is not valid.
    """
    given = query.get("limit", str(USUAL))
    if not given.isdecimal() or not 1 <= len(given) <= 3 or not 1 <= int(given) <= MOST:
        raise _invalid("limit", given, f"give a whole number from 1 to {MOST}")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _invalid("order", order, "give asc or desc")
    listed = list(items) if order == "asc" else list(reversed(items))
    begin, after = 0, query.get("after")
    if after is not None:
        places = [place for place, each in enumerate(listed) if each["id"] == after]
        if not places:
            raise _invalid("after", after, "the response has no item of this id")
        begin = places[0] + 1
    found = listed[begin : begin + int(given)]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": begin + len(found) < len(listed),
    }


def _invalid(name: str, value: str, remedy: str) -> ApiError:
    return ApiError(400, f"{name}={shown(value)}: {remedy}", param=name)

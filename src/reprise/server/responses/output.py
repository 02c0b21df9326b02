"""What a model writes, part by part, as items and as the events that tell of them.

A plain response is the items that its events would have told of: both come out of here.
"""

from __future__ import annotations

import secrets
from typing import Any

import orjson


class Output:
    """The items of one response, while they grow."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._texts: list[str] = []
        """Of the open item, so far."""
        self._events: list[bytes] = []
        self._sequence = 0

    def take_events(self) -> bytes:
        """The events since the last call."""
        found, self._events = b"".join(self._events), []
        return found

    def event(self, event: str, /, **fields: Any) -> None:
        """Tell of something."""
        data = {"type": event, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(data)))

    # ---- parts -----------------------------------------------------------------------------

    def content(self, text: str, logprobs: list[Any]) -> None:
        """More of the answer."""
        item = self._opened("message")
        item["content"][0]["logprobs"] += logprobs
        self._delta("response.output_text.delta", text, content_index=0, logprobs=logprobs)

    def reasoning(self, text: str) -> None:
        """More of what the model thinks."""
        self._opened("reasoning")
        self._delta("response.reasoning_text.delta", text, content_index=0)

    def call(self, name: str, call_id: str) -> None:
        """A call begins."""
        self.close("completed")
        self._begin("function_call", "fc", call_id=call_id, name=name, arguments="")

    def arguments(self, text: str) -> None:
        """More of the newest call's."""
        self._delta("response.function_call_arguments.delta", text)

    def close(self, status: str) -> None:
        """The open item is complete, or broken off."""
        item, text = self._open, "".join(self._texts)
        if item is None:
            return
        self._open, self._texts = None, []
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if item["type"] == "function_call":
            item["arguments"] = text
            self.event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=text
            )
        else:
            part = item["content"][0]
            part["text"] = text
            place["content_index"] = 0
            if item["type"] == "message":
                self.event(
                    "response.output_text.done", **place, text=text, logprobs=part["logprobs"]
                )
            else:
                self.event("response.reasoning_text.done", **place, text=text)
            self.event("response.content_part.done", **place, part=part)
        self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    # ---- shared ----------------------------------------------------------------------------

    def _opened(self, kind: str) -> dict[str, Any]:
        if self._open is not None and self._open["type"] == kind:
            return self._open
        self.close("completed")
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            return self._begin(kind, "msg", part, role="assistant")
        return self._begin(kind, "rs", {"type": "reasoning_text", "text": ""}, summary=[])

    def _begin(
        self, kind: str, prefix: str, part: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        name = f"{prefix}_{secrets.token_hex(16)}"
        item = {"id": name, "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._open = item
        index = len(self.items) - 1
        if part is None:
            self.event("response.output_item.added", output_index=index, item=item)
            return item
        item["content"] = []
        self.event("response.output_item.added", output_index=index, item=item)
        self.event(
            "response.content_part.added",
            item_id=name, output_index=index, content_index=0, part=part,
        )  # fmt: skip
        item["content"] = [part]
        return item

    def _delta(self, event: str, text: str, **fields: Any) -> None:
        assert self._open is not None
        self._texts.append(text)
        index = len(self.items) - 1
        self.event(event, item_id=self._open["id"], output_index=index, delta=text, **fields)

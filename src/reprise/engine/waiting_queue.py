"""Requests that wait to be admitted, the most urgent one first."""

from __future__ import annotations

import heapq

from reprise.request import Request


class WaitingQueue:
    """A heap by urgency; requests that finish while they wait are discarded from it."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._num_discarded = 0
        self.num_prompt_tokens = 0
        """Of the prompts of all requests that wait."""

    def __len__(self) -> int:
        return len(self._heap) - self._num_discarded

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.urgency, request))
        self.num_prompt_tokens += request.num_prompt_tokens

    def first(self) -> Request:
        while self._heap[0][1].finish_reason is not None:
            heapq.heappop(self._heap)
            self._num_discarded -= 1
        return self._heap[0][1]

    def pop(self) -> Request:
        request = self.first()
        heapq.heappop(self._heap)
        self.num_prompt_tokens -= request.num_prompt_tokens
        return request

    def discard(self, request: Request) -> None:
        """A queued request has finished; its entry goes when it comes up, or with many others."""
        self._num_discarded += 1
        self.num_prompt_tokens -= request.num_prompt_tokens
        if self._num_discarded > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[1].finish_reason is None]
            heapq.heapify(self._heap)
            self._num_discarded = 0

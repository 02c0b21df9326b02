"""Places on the device for what the sampler keeps of some requests from draw to draw."""

from __future__ import annotations

from reprise.platforms import Platform
from reprise.request import Request


class RequestSlots:
    """Numbers from 0 to ``max_requests`` - 1, one for each request that needs one.

    What lies at a request's number changes on the device alone, so that no draw waits for the
    host; it is made from the request's tokens when the request is new or was preempted.

    Args:
        vocab_size: V.
        max_requests: S, most requests at a time.
        platform: The device.
    """

    def __init__(self, vocab_size: int, max_requests: int, platform: Platform) -> None:
        self.vocab_size = vocab_size
        self.max_requests = max_requests
        self.platform = platform
        self.forget()

    def slot_of(self, request: Request) -> int:
        """The request's number; what lies there is made if it has none yet."""
        slot = self._slots.get(request.request_id)
        if slot is None:
            slot = self._slots[request.request_id] = self._free.pop()
            self.fill(slot, request)
        return slot

    def fill(self, slot: int, request: Request) -> None:
        """Make what lies at ``slot`` that of a request whose tokens are all known."""
        raise NotImplementedError

    def release(self, request_id: str) -> bool:
        """Forget a request; returns whether it had a slot."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
        return slot is not None

    def forget(self) -> None:
        """Forget all requests."""
        self._slots: dict[str, int] = {}
        self._free = list(range(self.max_requests))

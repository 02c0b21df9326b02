"""Which replica gets a request: the one that has the beginning of its prompt, unless another one
has much less to do.

What a replica has to do is counted in tokens: those of prompts until they are computed, without the
ones that it has, and those that requests may still generate until they end. A prefix that is
computed once too often costs its tokens, and blocks that another prefix loses: so a replica may be
busier by twice the tokens that it has of the prompt, and gets the request nevertheless. Not if it
has as many requests as it computes at once, while another one has a place left: there the request
would wait for another's end, which takes longer than any prefix.

What replicas have is not asked of them, which would cost a message for each block: it is the
prompts that they were sent and the outputs that came back, as many blocks as their cache holds, the
oldest forgotten first. When that is wrong a prefix is computed again, and no token is another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from reprise.cache import NO_PARENT, block_digest

PREFIX_WEIGHT = 2
"""How many tokens of work one token of a prefix that a replica has is worth."""
ASSUMED_OUTPUT = 256
"""Tokens that a request is taken to generate at most: ``max_tokens`` says how many it may, and most
end much earlier."""


@dataclass
class Route:
    """Where a request went, and what that was thought to cost."""

    replica: int
    prompt_tokens: int
    """To be computed; 0 when they are."""
    output_tokens: int
    completions: int
    """Places that it takes."""


class _Blocks:
    """What one replica is thought to have, the newest last.

    Args:
        most: Blocks.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def count(self, digests: Sequence[bytes]) -> int:
        """Of a prompt's blocks, the first ones that are there."""
        for number, each in enumerate(digests):
            if each not in self._known:
                return number
        return len(digests)

    def add(self, digests: Sequence[bytes]) -> None:
        # A block is of no use without those before it, so those are forgotten last.
        for each in reversed(digests):
            self._known[each] = None
            self._known.move_to_end(each)
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def clear(self) -> None:
        self._known.clear()


class Router:
    """Chooses. Not thread-safe.

    Args:
        block_size: Tokens of a block of the prefix cache; 0: prefixes are not cached.
        num_blocks: Of each replica's cache.
        most_requests: That a replica computes at once.
    """

    def __init__(self, block_size: int, num_blocks: Sequence[int], most_requests: int) -> None:
        self._block_size = block_size
        self._blocks = [_Blocks(each) for each in num_blocks]
        self.loads = [0] * len(num_blocks)
        """Tokens that each replica has to compute."""
        self._most_requests = most_requests
        self._taken = [0] * len(num_blocks)
        """Places of each that unfinished requests have."""
        self._chosen = [0] * len(num_blocks)
        """Requests that each one got."""

    def choose(
        self, tokens: Sequence[int], salt: bytes, completions: int, max_tokens: int | None
    ) -> Route:
        """Send a request somewhere.

        Args:
            tokens: Of its prompt.
            salt: It shares prefixes with prompts of the same one.
            completions: How many it asks for.
            max_tokens: Of each, at most.
        """
        digests = self._digests(tokens, salt)
        known = [self._block_size * each.count(digests) for each in self._blocks]
        replica = min(
            range(len(known)),
            key=lambda each: (
                self._taken[each] >= self._most_requests,
                self.loads[each] - PREFIX_WEIGHT * known[each],
                self._chosen[each],
                each,
            ),
        )
        output = min(ASSUMED_OUTPUT, max_tokens or ASSUMED_OUTPUT)
        route = Route(replica, len(tokens) - known[replica], completions * output, completions)
        self._taken[replica] += completions
        self.loads[replica] += route.prompt_tokens + route.output_tokens
        self._chosen[replica] += 1
        self._blocks[replica].add(digests)
        return route

    def began(self, route: Route) -> None:
        """The prompt of a routed request is computed."""
        self.loads[route.replica] -= route.prompt_tokens
        route.prompt_tokens = 0

    def ended(self, route: Route, tokens: Sequence[int] = (), salt: bytes = b"") -> None:
        """Nothing of it is left to do.

        Args:
            route: Of a request.
            tokens: Of prompt and output, which the replica has in its cache.
            salt: Of the request.
        """
        self.began(route)
        self.loads[route.replica] -= route.output_tokens
        self._taken[route.replica] -= route.completions
        route.output_tokens = route.completions = 0
        # Keys and values of the last token were not computed.
        self._blocks[route.replica].add(self._digests(tokens[:-1], salt))

    def forget(self) -> None:
        """No replica has any prefix."""
        for each in self._blocks:
            each.clear()

    def _digests(self, tokens: Sequence[int], salt: bytes) -> list[bytes]:
        size = self._block_size
        if size == 0:
            return []
        found, parent = [], NO_PARENT
        for end in range(size, len(tokens) + 1, size):
            parent = block_digest(parent, tokens[end - size : end], salt)
            found.append(parent)
        return found

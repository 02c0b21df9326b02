"""One call of an op, taken apart into its rows: tokens, or requests with theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reprise.ops import Op
from reprise.ops.cases import Arguments


class Rows:
    """The rows of a call, from which others are made.

    Args:
        op: Declares which arguments have rows.
        arguments: Of the call.
    """

    def __init__(self, op: Op, arguments: Arguments) -> None:
        self._op, self._arguments = op, arguments
        self._starts: list[int] | None = None
        """Of requests, where their tokens begin."""
        self.numbers: list[int]
        """Of the rows that are no padding."""
        if op.requests:
            self._starts = arguments["query_start_loc"].tolist()
            lengths = arguments["seq_lens"].tolist()
            self.numbers = [n for n, length in enumerate(lengths) if length and self._tokens(n)]
        else:
            self.numbers = list(range(len(arguments[op.rows[0]])))

    @property
    def states(self) -> list[str]:
        """Arguments that live on from step to step."""
        return [name for name in self._op.written(self._arguments) if name in self._op.state]

    @property
    def once(self) -> bool:
        """A row cannot be in a call twice: it is a request, and has one state."""
        return bool(self.states and self._op.requests)

    def together(self, rows: Sequence[int], state: Arguments | None = None) -> Arguments:
        """Arguments of a call with these rows alone.

        Args:
            rows: Their numbers, in any order.
            state: Has the states; None: as they are in the call.
        """
        named = {**self._arguments, **{name: state[name] for name in self.states if state}}
        tokens = list(rows)
        if self._starts is not None:
            counts = [len(self._tokens(row)) for row in rows]
            tokens = [token for row in rows for token in self._tokens(row)]
            ends = torch.tensor([0, *counts]).cumsum(0)
            named["query_start_loc"] = ends.to(self._arguments["query_start_loc"])
            for name in self._op.requests:
                named[name] = _picked(named[name], rows)
        if isinstance(named.get("live"), Tensor):  # rows from there on would be padding
            named["live"] = torch.full_like(named["live"], len(tokens))
        for name in self._op.rows:
            named[name] = _picked(named[name], tokens)
        return named

    def _tokens(self, request: int) -> range:
        assert self._starts is not None
        return range(self._starts[request], self._starts[request + 1])


def _picked(value: Tensor | None, places: Sequence[int]) -> Tensor | None:
    return None if value is None else value[torch.tensor(places, device=value.device)]

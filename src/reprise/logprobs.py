"""Log probabilities as callers get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Logprob:
    """Log probability of one token at one position, under the model's unmodified logits."""

    logprob: float
    rank: int | None = None
    """1 is the likeliest token."""
    decoded_token: str | None = None
    """None without a tokenizer, and with ``detokenize=False``."""


class WholeLogprobs(Mapping[int, Logprob]):
    """Those of the whole vocabulary at one position, the chosen token first, then by rank.

    Entries are made when they are read: the engine's thread would take as long for one position
    as for many steps.

    Args:
        chosen: The token of this position.
        values: [V] float32, a numpy array of its own.
    """

    def __init__(self, chosen: int, values: Any) -> None:
        self._chosen = chosen
        self._values = values
        self._ranks: Any = None
        self.decode: Callable[[int], str] | None = None
        """Gives a token's text."""

    @property
    def parts(self) -> tuple[int, Any]:
        """What makes an equal one, but for ``decode``."""
        return self._chosen, self._values

    def __getitem__(self, token: int) -> Logprob:
        if not 0 <= token < len(self._values):
            raise KeyError(token)
        value = self._values[token]
        if self._ranks is None:
            rank = int((self._values > value).sum()) + 1
        else:
            rank = int(self._ranks[token])
        return Logprob(float(value), rank, None if self.decode is None else self.decode(token))

    def __iter__(self) -> Iterator[int]:
        falling = -self._values
        order = falling.argsort(kind="stable")
        if self._ranks is None:  # the reader will ask for many
            self._ranks = falling[order].searchsorted(falling, "left") + 1
        yield self._chosen
        for token in order.tolist():
            if token != self._chosen:
                yield token

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # the tokenizer stays here

    def __repr__(self) -> str:
        return f"WholeLogprobs({self._chosen}: {self[self._chosen]}, ... {len(self)} tokens)"


Logprobs = dict[int, Logprob] | WholeLogprobs
"""Token id to its log probability; the chosen token comes first."""

"""The choice of an implementation by what it is called with, made once for each kind of call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from reprise.errors import OpError
from reprise.ops.implementation import Implementation

logger = logging.getLogger(__name__)

NOT_INVARIANT = "batch_invariant=True: no batch-invariant implementation of "
"""What messages begin with that name an op which has none."""
MOST_KINDS = 4096
"""Of calls of one op to remember: a number that is another in each call would make ever more."""


def signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What is the same in all calls of a kind: of tensors the dtype and every dimension but the
    first, which counts tokens or requests; numbers as they are."""
    if kwargs:
        return (*map(_static, args), *((name, _static(each)) for name, each in kwargs.items()))
    return tuple(map(_static, args))


def _static(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.shape[1:]
    return tuple(map(_static, value)) if isinstance(value, list | tuple) else value


def shown(named: Mapping[str, Any]) -> str:
    """A kind of call for people: ``query [*, 32, 128] bfloat16, scale 0.088``."""
    return ", ".join(f"{name} {_shown(each)}" for name, each in named.items())


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    sizes = ", ".join(("*", *map(str, value.shape[1:]))) if value.dim() else ""
    return f"[{sizes}] {str(value.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Answer:
    """What computes one kind of call, and why others do not."""

    call: str
    """The kind of call, for people."""
    implementation: Implementation
    refused: dict[str, str]
    """Reasons of the implementations that come before it, by name."""


@dataclass(eq=False)
class ByArguments:
    """The function of an op whose arguments decide which implementation computes.

    Args:
        op: Its name.
        named: A call's arguments by name.
        candidates: Those that the platform can run, most wanted first. The last takes everything,
            unless it is the only one: the user asked for it, and nothing may take its place.
        batch_invariant: These are all that are batch-invariant, and nothing else may compute.
    """

    op: str
    named: Callable[[Sequence[Any], Mapping[str, Any]], Mapping[str, Any]]
    candidates: Sequence[Implementation]
    batch_invariant: bool = False
    answers: dict[Hashable, Answer] = field(default_factory=dict)
    """By signature."""
    _functions: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._functions.get(signature(args, kwargs))
        if found is None:
            found = self.answer(args, kwargs).implementation.function
        return found(*args, **kwargs)

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer:
        """Which implementation computes a call; asked once for each kind.

        Raises:
            OpError: The user asked for an implementation that does not accept it, or none that is
                batch-invariant does.
        """
        key = signature(args, kwargs)
        known = self.answers.get(key)
        if known is not None:
            return known
        refused: dict[str, str] = {}
        arguments = self.named(args, kwargs)
        call = shown(arguments)
        for each in self.candidates:
            reason = each.refusal(**arguments)
            if reason is None:
                break
            refused[each.name] = reason
        else:
            if self.batch_invariant:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
                raise OpError(f"{NOT_INVARIANT}{self.op} ({reasons}; {call})")
            raise OpError(
                f"--op {self.op}={self.candidates[0].name}: {'; '.join(refused.values())} "
                f"({call}); leave the choice to Reprise, or name another implementation"
            )
        for name, reason in refused.items():
            if reason not in set(self._reasons(name)):
                logger.info("op %s: %s and not %s (%s)", self.op, each.name, name, reason)
        if len(self.answers) >= MOST_KINDS:
            self.answers.clear()
            self._functions.clear()
        self._functions[key] = each.function
        answer = self.answers[key] = Answer(call, each, refused)
        return answer

    def _reasons(self, name: str) -> Iterator[str]:
        """Why an implementation was refused so far."""
        answers = list(self.answers.values())  # other threads add some
        return (each.refused[name] for each in answers if name in each.refused)


def resolved(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[..., Any]:
    """What computes a call of an op whose function is ``function``: for callers that call it many
    times."""
    if isinstance(function, ByArguments):
        return function.answer(args, kwargs).implementation.function
    return function

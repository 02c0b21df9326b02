"""What is known of a declared op, and which implementations it has for a platform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from reprise.errors import OpError
from reprise.ops import put_off
from reprise.ops.cases import Cases
from reprise.ops.choice import resolved
from reprise.ops.implementation import (
    Accepts,
    GraphSupportOn,
    Implementation,
    InvariantOn,
    Requirement,
    anything,
    runs_anywhere,
)
from reprise.ops.interception import interceptor
from reprise.platforms import Platform


def nothing(*args: Any, **kwargs: Any) -> None:
    """What an op returns that writes into its arguments."""


@dataclass
class Op:
    """A declared op. Calling it goes through the dispatcher to the chosen implementation."""

    name: str
    schema: str
    """In torch.library's notation, without the name: ``(Tensor x, ...) -> Tensor``."""
    mutates: tuple[str, ...]
    """Names of the arguments that the op writes."""
    break_op: bool
    """The op must run outside the graph in piecewise executors."""
    cases: Cases
    """Inputs that its implementations are compared, timed and compiled on."""
    extent: str | None = None
    """The argument that says how far the op reaches into each request, if one does."""
    state: tuple[str, ...] = ()
    """The arguments of :attr:`mutates` that live on from step to step."""
    collective: bool = False
    """It waits for other ranks: all call it in one order, and none in a thread of its own."""
    rows: tuple[str, ...] = ()
    """Arguments whose first dimension counts tokens; of what it returns, the first counts them
    too."""
    requests: tuple[str, ...] = ()
    """Arguments whose first dimension counts requests, which have rows by ``query_start_loc``."""
    strided: tuple[str, ...] = ()
    """Vectors whose numbers need not adjoin."""
    implementations: dict[str, Implementation] = field(default_factory=dict)
    overload: Any = None
    kernel: Any = None
    """What the overload comes down to: the implementation of the table that counts."""
    table: Callable[[Sequence[Any]], Any] | None = None
    """Says which table counts for a call with such arguments."""
    fake: Callable[..., Any] = nothing
    """Returns what the op would, with memory of any content."""

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of the op's arguments, in order."""
        return tuple(each.name for each in self.overload._schema.arguments)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def written(self, named: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The arguments of a call that the op writes; it may be called without some."""
        found = {name: named.get(name) for name in self.mutates}
        return {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The dispatcher is for torch modes that look on: compilers and recorders. Without them the
        # way through it would be a tenth of what the host does in an eager step.
        if torch.compiler.is_compiling():
            return self.overload(*args, **kwargs)
        if torch._C._len_torch_dispatch_stack():
            return put_off.aside(self.overload, *args, **kwargs)
        return self.kernel(*args, **kwargs)

    def repeatedly(self, *args: Any, others: int = 0) -> Callable[..., Any]:
        """Compute, and return a function that computes again on the same tensors: see ``bind`` of
        :class:`Implementation`.

        Args:
            args: Of the call.
            others: So many of the last ones are the function's own arguments, other ones each time.
        """
        assert self.table is not None, "it is declared"
        table = self.table(args)
        bind = getattr(resolved(table.functions[self.name], args, {}), "bind", None)
        if bind is not None and interceptor.get() is None:
            return cast("Callable[..., Any]", bind(*args))
        self(*args)
        return functools.partial(self, *args[: len(args) - others])

    def implementation(
        self,
        name: str,
        target: str | Callable[..., Any],
        *,
        requires: Requirement = runs_anywhere,
        accepts: Accepts = anything,
        graph_support: GraphSupportOn = "always",
        error: float | None = None,
        on_request: str | None = None,
        batch_invariant: InvariantOn = False,
    ) -> None:
        """Add a way to compute this op.

        Args:
            name: How ``--op NAME=IMPL`` and ``Platform.preferred`` call it.
            target: A function with the op's signature, or ``"module:function"`` to import late.
            requires: Says whether a platform can run it.
            accepts: Says whether it computes calls with such arguments. The next one that is
                wanted computes those that it does not; the reference takes everything.
            graph_support: For break ops, the steps in which it may be captured; ``never`` of any
                other op excludes graphs. It may be a function of the platform.
            error: See :class:`Implementation`; graphs with an exact one are compared bit by bit.
            on_request: Why it computes only where ``--op NAME=IMPL`` asks for it, such as that no
                device has run it yet. None: it is chosen as any other.
            batch_invariant: See :class:`Implementation`; what engines with that option choose from.
        """
        if name in self.implementations:
            raise OpError(f"op {self.name!r} already has an implementation {name!r}")
        self.implementations[name] = Implementation(
            self.name, name, target, requires, graph_support, error, accepts, on_request,
            batch_invariant,
        )  # fmt: skip

    def candidates(
        self, platform: Platform, override: str | None = None, *, batch_invariant: bool = False
    ) -> list[Implementation]:
        """The implementations to use on ``platform``, most wanted first: each computes what those
        before it do not accept, and the last accepts everything, unless it is the override.

        With ``batch_invariant`` only those that are; there may be none, and the last may refuse.

        Raises:
            OpError: ``override`` names none, one that this platform cannot run or that does not
                import, or one that is not batch-invariant and has to be.
        """
        if override is not None:
            chosen = self.implementations.get(override)
            if chosen is None:
                raise OpError(
                    f"op {self.name!r} has no implementation {override!r}; "
                    f"it has: {', '.join(self.implementations)}"
                )
            reason = chosen.unusable(platform)
            if reason is not None:
                raise OpError(f"--op {self.name}={override}: {reason} ({platform.name})")
            if batch_invariant and not chosen.batch_invariant_on(platform):
                raise OpError(
                    f"--op {self.name}={override}: bits of a row depend on other rows there, which "
                    f"batch_invariant=True rules out; {self.invariant_ones(platform)}"
                )
            return [chosen]
        order = platform.preferred.get(self.name, platform.preferred.get("*", ()))
        if batch_invariant:
            order = (*order, *self.implementations)
        found: list[Implementation] = []
        for name in dict.fromkeys((*order, "reference")):
            candidate = self.implementations.get(name)
            if candidate is None or candidate.on_request is not None:
                continue
            if batch_invariant and not candidate.batch_invariant_on(platform):
                continue
            if candidate.unusable(platform) is None:
                found.append(candidate)
                if candidate.accepts is anything:
                    return found
        if batch_invariant:
            return found
        raise OpError(f"op {self.name!r} has no implementation for platform {platform.name!r}")

    def invariant_ones(self, platform: Platform) -> str:
        """For people: the implementations that are batch-invariant on the platform."""
        found = [
            f"--op {self.name}={name}" + ("" if each.on_request is None else f", {each.on_request}")
            for name, each in self.implementations.items()
            if each.batch_invariant_on(platform) and each.requires(platform) is None
        ]
        return ", ".join(found) or f"no other is batch-invariant on {platform.name}"

    def varies(self, platform: Platform) -> str:
        """Its name, with what could be asked for where it has no batch-invariant implementation
        that is chosen by itself."""
        asked = self.invariant_ones(platform)
        return f"{self.name} ({asked})" if asked.startswith("--op") else self.name


declared: dict[str, Op] = {}
"""Every op by name."""

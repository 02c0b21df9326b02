"""One way to compute an op: where it runs, what it takes, what it promises."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reprise.errors import OpError, describe
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

GraphSupport = Literal["never", "single_token_decode", "uniform_batch", "always"]
"""In which steps a break op's implementation may run inside a graph. ``never``: in none;
``single_token_decode``: when each request has one new token; ``uniform_batch``: when all requests
have the same number of new tokens; ``always``: in any step. Of other ops ``never`` alone counts:
no graph holds them, and none is broken for them."""

GraphSupportOn = GraphSupport | Callable[[Platform], GraphSupport]
"""The same everywhere, or by platform."""

InvariantOn = bool | Callable[[Platform], bool]
"""Whether bits of a row depend on that row alone: the same everywhere, or by platform."""

Requirement = Callable[[Platform], str | None]
"""Returns None if the implementation runs on the platform, else the reason why not."""

Accepts = Callable[..., str | None]
"""Called with the op's arguments by name; returns None if the implementation computes such calls,
else the reason why not. It sees dtypes, every dimension of a tensor but the first, and numbers:
what is the same in all calls of a kind. Tensors are stand-ins without memory whose first dimension
is 0."""


def runs_anywhere(platform: Platform) -> str | None:
    return None


def anything(*args: Any, **kwargs: Any) -> str | None:
    return None


def on_the_host(platform: Platform) -> bool:
    """What torch computes row by row on a CPU, and by the number of rows elsewhere."""
    return platform.device_type == "cpu"


def on_an_accelerator(platform: Platform) -> bool:
    """What torch computes number by number there, and the end of a tensor by other code on a CPU:
    functions of single numbers. A device that Triton cannot compile for may have the CPU's kernels.
    """
    return not on_the_host(platform) and platform.has_triton


def needs_triton(platform: Platform) -> str | None:
    return None if platform.has_triton else "Triton cannot run on this platform"


def _stand_in(value: Any) -> Any:
    """What a check sees of an argument: nothing that two calls of a kind could differ in."""
    if isinstance(value, Tensor):
        shape = (0, *value.shape[1:]) if value.dim() else ()
        return torch.empty(shape, dtype=value.dtype, device="meta")
    return [_stand_in(each) for each in value] if isinstance(value, list | tuple) else value


_failures: dict[str, Exception] = {}
_told: list[Exception] = []


def _imported(module: str) -> Any:
    """The module. One that could not be imported is not tried again for the next op: it may take
    a compiler's time to fail."""
    if module in _failures:
        raise _failures[module].with_traceback(None)
    try:
        return importlib.import_module(module)
    except Exception as error:
        _failures[module] = error
        raise


@dataclass
class Implementation:
    """One way to compute an op; its function is imported when a table considers it."""

    op: str
    name: str
    target: str | Callable[..., Any]
    """The function, or ``"module:function"``.

    It may have an attribute ``bind``: a function of the same arguments that computes once and
    returns a function that computes again on the same tensors, without the host work that is the
    same each time. Breakable graphs call break ops that way.
    """
    requires: Requirement = runs_anywhere
    graph_support: GraphSupportOn = "always"
    error: float | None = None
    """None: the same inputs give the same bits. Else the largest difference between two calls of
    the same inputs, relative to the largest magnitude in a row of the result."""
    accepts: Accepts = anything
    on_request: str | None = None
    """Why only those that ask for it by name get it; None: it is chosen as any other."""
    batch_invariant: InvariantOn = False
    """The bits that it gives a row (a token, or a request) depend on that row alone: not on how
    many others there are, on what they hold, nor on its place among them."""
    import_failure: str | None = field(default=None, init=False)
    """Why its function cannot be had, once that was tried."""

    def unusable(self, platform: Platform) -> str | None:
        """Why it cannot run on the platform; None: it can, and its function is imported."""
        try:
            reason = self.requires(platform)
        except Exception as error:
            return f"its requirement fails: {describe(error)}"
        if reason is not None:
            return reason
        if self.import_failure is None:
            try:
                self.function  # noqa: B018 - imports
            except Exception as error:  # a module may raise anything
                self.import_failure = f"it cannot be imported: {describe(error)}"
                # Of ops that share a module the first one's line is enough.
                level = logging.DEBUG if error in _told else logging.WARNING
                _told.append(error)
                logger.log(
                    level, "op %s: %s is skipped, %s", self.op, self.name, self.import_failure
                )
        return self.import_failure

    def refusal(self, **arguments: Any) -> str | None:
        """Why it does not compute a call with these; None: it does."""
        if self.accepts is anything:
            return None
        try:
            return self.accepts(**{name: _stand_in(each) for name, each in arguments.items()})
        except Exception as error:  # a module may raise anything
            return f"what it accepts cannot be told: {describe(error)}"

    def graph_support_on(self, platform: Platform) -> GraphSupport:
        """In which steps it may run inside a graph of the platform.

        Raises:
            OpError: What it declares is no level of support.
        """
        declared = self.graph_support
        level = declared(platform) if callable(declared) else declared
        if level not in get_args(GraphSupport):
            raise OpError(
                f"op {self.op!r}: graph_support={level!r} of {self.name!r} must be one of "
                f"{', '.join(get_args(GraphSupport))}"
            )
        return level

    def batch_invariant_on(self, platform: Platform) -> bool:
        """Whether the bits of a row depend on that row alone on the platform."""
        declared = self.batch_invariant
        return declared(platform) if callable(declared) else declared

    @property
    def compiles(self) -> bool:
        """Whether its kernels are compiled when they are first called."""
        return self.requires is needs_triton

    @property
    def function(self) -> Callable[..., Any]:
        target = self.target  # read once: another thread may replace it meanwhile
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = self.target = getattr(_imported(module), attribute)
        if not callable(target):
            raise TypeError(f"{target!r} is no function")
        return target

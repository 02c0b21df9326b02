"""Every error that Reprise raises for a cause the user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def ordinary(error: BaseException) -> Exception:
    """What a caller gets of an error in another thread: itself, or one that ends nothing but his
    request. Libraries in Rust raise what is no Exception where they panic."""
    return error if isinstance(error, Exception) else RepriseError(describe(error))


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message; the next one too where that announces
    it."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip()]
    told = lines[0] if lines else repr(error)
    if told.endswith(":") and len(lines) > 1:
        told = f"{told} {lines[1]}"
    return f"{type(error).__name__}: {told}"


class RepriseError(Exception):
    """Base of all typed errors. The message names the field, the value and the remedy."""


class ConfigError(RepriseError, ValueError):
    """An engine option, or a combination of options, is invalid."""


class PlatformError(RepriseError, RuntimeError):
    """The requested device is unknown or not usable on this machine."""


class ModelError(RepriseError, ValueError):
    """A model cannot be found, its config is not supported, or it fails validation."""


class LoadError(RepriseError, RuntimeError):
    """A checkpoint is missing, corrupted or does not fit the model's parameters."""


class RequestError(RepriseError, ValueError):
    """A request or its sampling parameters are invalid; other requests are unaffected."""


class CapacityError(RepriseError, RuntimeError):
    """The KV cache or the context is too small for what was asked."""


class FailedRequestError(RepriseError):
    """A request that was accepted cannot be finished. Other requests go on.

    Args:
        message: Which request, where, and the remedy.
        outputs: Of :meth:`reprise.LLM.generate`, the :class:`reprise.RequestOutput` of every
            prompt, in their order; those that failed have the finish reason ``error``.
    """

    def __init__(self, message: str, outputs: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.outputs = list(outputs)


class NonFiniteError(FailedRequestError, ArithmeticError):
    """A request's logits were NaN or infinite: no token can be drawn."""


class GrammarError(FailedRequestError):
    """A token was drawn that a request's grammar does not allow."""


class OpError(RepriseError, RuntimeError):
    """An op or one of its implementations is unknown or not usable on the platform."""


class GraphError(RepriseError, RuntimeError):
    """A computation cannot be captured as a device graph, or a graph was misused."""


class WeightsLostError(GraphError):
    """A graph changed weights that cannot be loaded again: nothing computed from them is right."""


class GraphReplayError(GraphError):
    """A replay raised. The graph is not replayed again; what it was to write is unknown."""


class RanksError(RepriseError, RuntimeError):
    """A process that computes a part of the model has ended, hangs, or has lost step with the
    others. The engine is of no use any more: create a new one."""

    rank: int | None = None
    """Of those that wait for each other the one that was waited for in vain; None: others were
    not, or it is not known."""


class UnsupportedError(RepriseError, AttributeError):
    """A part of vLLM's interface that Reprise does not have."""


class StepError(RepriseError, RuntimeError):
    """A step failed in an engine of another process: its requests ended, and it takes others."""


def named(kind: str, message: str) -> RepriseError:
    """An error that another process has raised.

    Args:
        kind: Name of its type.
        message: Its message.
    """
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, RepriseError):
        return found(message)
    return RepriseError(message)

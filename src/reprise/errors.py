"""Every error that Reprise raises for a cause the user can act on."""

from __future__ import annotations


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


class OpError(RepriseError, RuntimeError):
    """An op or one of its implementations is unknown or not usable on the platform."""


class GraphError(RepriseError, RuntimeError):
    """A computation cannot be captured as a device graph, or a graph was misused."""


class UnsupportedError(RepriseError, AttributeError):
    """A part of vLLM's interface that Reprise does not have."""

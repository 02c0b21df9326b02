"""One file an architecture; the registry finds it by the name that checkpoints carry."""

from reprise.models.registry import architectures, build

__all__ = ["architectures", "build"]

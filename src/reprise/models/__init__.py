"""One file an architecture; the registry finds it by the name that checkpoints carry."""

from reprise.models.config_reader import require_layer_count, whole_number
from reprise.models.registry import (
    architectures,
    build,
    build_mtp,
    has_text_part,
    require_known,
)

__all__ = [
    "architectures",
    "build",
    "build_mtp",
    "has_text_part",
    "require_known",
    "require_layer_count",
    "whole_number",
]

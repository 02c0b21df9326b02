"""What the start of an engine needs and torch does not, begun before torch is imported."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

from reprise import compiling, platforms


def begin(options: Mapping[str, Any]) -> None:
    """Begin it, beside whatever comes next, in a process that will have an engine and make no fork
    before.

    Args:
        options: Of the engine, as users give them.
    """
    device = options.get("device", "auto")
    compiling.begin(device, options.get("dtype", "auto"))
    platforms.wake(device, then=fingerprint_compiler)


def fingerprint_compiler() -> None:
    """Have Triton read all of itself, which its kernel cache asks for: 400 MB."""
    # Where it is missing or does not import, its kernels are left out by name.
    with contextlib.suppress(Exception):
        cache = importlib.import_module("triton.runtime.cache")
        fingerprint = getattr(cache, "triton_key", None)
        if fingerprint is not None:  # where it is not called so, the first kernel pays
            fingerprint()

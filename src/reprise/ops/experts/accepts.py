from typing import Any


def accepts(limit: float = 0.0, **_: Any) -> str | None:
    """Which calls the Triton kernels compute."""
    return "it does not clamp what the gates multiply" if limit else None

from typing import Any

from torch import Tensor

from reprise.ops.causal_conv.accepts import NO_DRAFTS


def accepts(recent: Tensor | None = None, **_: Any) -> str | None:
    """Which calls the Triton kernels compute."""
    return None if recent is None else NO_DRAFTS

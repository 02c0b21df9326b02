from typing import Any

from torch import Tensor

NO_DRAFTS = "it cannot take drafts back that do not count"


def accepts(accepted: Tensor | None = None, **_: Any) -> str | None:
    """Which calls the Triton kernels compute."""
    return None if accepted is None else NO_DRAFTS

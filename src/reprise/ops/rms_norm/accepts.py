from typing import Any

from torch import Tensor

_SHARED_OUT = 32768
"""Numbers of a sum that torch shares out over threads."""


def sums_alone(x: Tensor, **_: Any) -> str | None:
    """Of implementations whose bits of a row must not depend on others."""
    if x.shape[-1] < _SHARED_OUT:
        return None
    return f"the {x.shape[-1]} numbers of a row are summed in another order when it comes alone"

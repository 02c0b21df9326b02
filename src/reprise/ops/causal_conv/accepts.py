from torch import Tensor

NO_DRAFTS = "it cannot take drafts back that do not count"


def accepts(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    fresh: Tensor,
    out: Tensor,
    query_len: int,
    accepted: Tensor | None = None,
    known: Tensor | None = None,
    places: Tensor | None = None,
) -> str | None:
    """Which calls the Triton kernels compute."""
    return None if accepted is None else NO_DRAFTS

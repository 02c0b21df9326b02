from torch import Tensor

from reprise.ops.causal_conv.accepts import NO_DRAFTS


def accepts(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    fresh: Tensor,
    out: Tensor,
    query_len: int,
    recent: Tensor | None = None,
    gates: Tensor | None = None,
    accepted: Tensor | None = None,
    known: Tensor | None = None,
    places: Tensor | None = None,
) -> str | None:
    """Which calls the Triton kernels compute."""
    return None if recent is None else NO_DRAFTS

import torch
from torch import Tensor

from reprise.ops.hyper_connection.reference import collapse, follow, mixes


def reference(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    """The end of hyper-connections: the last sublayer's output goes into the streams, and their sum
    with factors ``sigmoid(m) + eps`` is what the decoder gives. See
    :func:`reprise.ops.hyper_connection` for m; here nothing is made doubly stochastic.

    Args:
        streams: [T, n, D], changed.
        fn: [n, n * D] float32.
        base: [n] float32.
        scale: [1] float32.
        eps: Of the factors.
        norm_eps: Of the norm in front of ``fn``.
        y: [T, D], what the last sublayer gave.
        post: [T, n] float32, its factors.
        comb: [T, n, n] float32, its matrix.

    Returns:
        [T, D], contiguous.
    """
    streams.copy_(follow(streams, y, post, comb))
    factors = torch.sigmoid(mixes(streams, fn, norm_eps) * scale.float() + base.float()) + eps
    return collapse(streams, factors)


def fake(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    return streams.new_empty((streams.shape[0], streams.shape[2]))

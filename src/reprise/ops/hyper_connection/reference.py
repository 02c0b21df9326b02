import torch
from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm


def reference(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    gain: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    """Between two sublayers: manifold-constrained hyper-connections (Xie et al. 2026).

    First what the sublayer before gave goes into the streams (:func:`follow`). Before the first
    one that is the embedding, into streams of zeros, with factors of 1 and matrices of zeros.
    Then three sets of factors follow from all streams of a token together, ``m`` (:func:`mixes`):
    those that the next sublayer's input is a sum with, ``sigmoid(m) + eps``; those that its output
    will be added with, ``2 * sigmoid(m)``; and a matrix that mixes the streams, the softmax of each
    row of m, plus eps, then made doubly stochastic: its columns are divided by their sums, and
    ``iterations - 1`` times its rows and its columns (Sinkhorn & Knopp 1967). All in float32.

    Args:
        streams: [T, n, D], changed.
        fn: [(2 + n) * n, n * D] float32.
        base: [(2 + n) * n] float32.
        scale: [3] float32: of the input's, the output's and the matrix's factors.
        gain: [D], of the norm of the next sublayer's input, as ``rms_norm`` takes it.
        iterations: How often columns are normalised, at least 1.
        eps: Of the factors and sums.
        norm_eps: Of both norms.
        y: [T, D], what the sublayer before gave.
        post: [T, n] float32: the factors of ``y``; those of the next sublayer's output are written
            there.
        comb: [T, n, n] float32, the matrices: likewise.

    Returns:
        The next sublayer's input [T, D], normalised, contiguous.
    """
    streams.copy_(follow(streams, y, post, comb))
    count = streams.shape[1]
    first, second, matrix = mixes(streams, fn, norm_eps).split([count, count, count * count], 1)
    of_first, of_second, of_matrix = base.float().split([count, count, count * count])
    pre = torch.sigmoid(first * scale[0] + of_first) + eps
    post.copy_(2 * torch.sigmoid(second * scale[1] + of_second))
    mixed = (matrix * scale[2] + of_matrix).unflatten(1, (count, count)).softmax(dim=-1) + eps
    mixed = mixed / (mixed.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mixed = mixed / (mixed.sum(dim=-1, keepdim=True) + eps)
        mixed = mixed / (mixed.sum(dim=-2, keepdim=True) + eps)
    comb.copy_(mixed)
    return rms_norm(collapse(streams, pre), gain, norm_eps)


def follow(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams behind a sublayer: stream k is ``post[k] * y + sum_j comb[j, k] * stream j``.

    The sum is over the first index of ``comb``, which is not symmetric.
    """
    mixed = torch.einsum("tjk,tjd->tkd", comb, streams.float())
    return (post.unsqueeze(2) * y.float().unsqueeze(1) + mixed).to(streams.dtype)


def mixes(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """[T, len(fn)] float32: ``fn`` times all streams of a token side by side, divided by their root
    mean square."""
    flat = streams.flatten(1).float()
    flat = flat * torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + norm_eps)
    return flat @ fn.float().t()


def collapse(streams: Tensor, factors: Tensor) -> Tensor:
    """[T, D]: the sum of the streams, each times its factor [T, n], rounded once."""
    return (factors.unsqueeze(2) * streams.float()).sum(dim=1).to(streams.dtype)


def fake(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    gain: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    return streams.new_empty((streams.shape[0], streams.shape[2]))

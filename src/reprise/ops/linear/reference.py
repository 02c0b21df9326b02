import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.reference import reference as silu_and_mul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, through the device's BLAS.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [T, N], contiguous.
    """
    return F.linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``silu(gate) * up`` of :func:`linear`.

    Args:
        x: [T, K].
        weight: [2*I, K], the rows of the gate first.
        bias: [2*I], or None.

    Returns:
        [T, I], contiguous.
    """
    return silu_and_mul(linear(x, weight, bias))


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """:func:`linear` of x after its root mean square norm.

    Args:
        x: [T, K].
        norm_weight: [K].
        eps: Of the norm.
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [T, N], contiguous.
    """
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The first half of a SwiGLU feed-forward: ``silu(gate) * up`` of x after its norm.

    Args:
        x: [T, K].
        norm_weight: [K].
        eps: Of the norm.
        weight: [2*I, K], the rows of the gate first.
        bias: [2*I], or None.

    Returns:
        [T, I], contiguous.
    """
    return silu_and_mul(norm_linear(x, norm_weight, eps, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """Add :func:`linear` to ``residual``, in place.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N], or None.
        residual: [T, N].
    """
    residual.add_(linear(x, weight, bias))


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write ``x @ weight.T`` into ``out``.

    Args:
        x: [T, K].
        weight: [N, K].
        out: [T, N].
    """
    torch.mm(x, weight.t(), out=out)


def fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def fake_gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


def fake_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def fake_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))

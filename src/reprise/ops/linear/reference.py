import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, through the device's BLAS.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [T, N], contiguous.
    """
    return F.linear(x, weight, bias)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))

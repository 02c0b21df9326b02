from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """Add ``x`` to the residual stream and normalise the sum, both in place.

    ``residual += x``, rounded to its dtype; ``x = rms_norm(residual)``.

    Args:
        x: [T, D], a layer's output; becomes the next layer's input.
        residual: [T, D], same dtype.
        weight: [D], the gain.
        eps: Added to the mean square.
    """
    residual.add_(x)
    x.copy_(rms_norm(residual, weight, eps))

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.reference import reference as silu_and_mul

LARGEST = 448.0
"""Of float8_e4m3fn."""
LEAST_MAGNITUDE = 1e-10
"""What counts as a group's largest magnitude where it is smaller: zeros have a scale too."""


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """``quantised(x) @ (weight * scale).T + bias``, both factors of eight bits, sums in float32.

    The activations are quantised here, whatever the number of rows, so that a request gets the
    same function in prefill and decode. For each row and each ``block_k`` inputs::

        s = max(largest magnitude, 1e-10) / 448
        quantised = float8_e4m3fn(x / s) * s

    in float32, divided (not multiplied by an inverse), rounded to nearest even: kernels must get
    the same eight bits. Nothing of a row depends on other rows.

    Two layouts are in use: blocks of 128 by 128 (DeepSeek-V3 report, 3.3.2), and ``block_n`` 1 with
    ``block_k`` K, a scale for each output and for each row of activations.

    Args:
        x: [T, K] in the compute dtype; strides of rows are free, those of elements are 1.
        weight: [N, K] float8_e4m3fn, contiguous.
        scale: [ceil(N / block_n), ceil(K / block_k)] float32, contiguous: what a block of weights
            is multiplied by. The last blocks may be cut off.
        bias: [N] in the compute dtype, or None.
        block_n: Outputs that share a scale.
        block_k: Inputs that share a scale, of weights and of activations.

    Returns:
        [T, N] in the compute dtype, contiguous.
    """
    numbers, scales = quantise(x, block_k)
    product = F.linear(
        dequantise(numbers, scales, 1, block_k), dequantise(weight, scale, block_n, block_k)
    )
    if bias is not None:
        product += bias
    return product.to(x.dtype)


def fp8_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> Tensor:
    """:func:`fp8_linear` of x after its root mean square norm.

    Args:
        x: [T, K].
        norm_weight: [K].
        eps: Of the norm.
        weight: As of :func:`fp8_linear`, like all that follows.
        scale: The same.
        bias: The same.
        block_n: The same.
        block_k: The same.

    Returns:
        [T, N] in the compute dtype, contiguous.
    """
    return fp8_linear(rms_norm(x, norm_weight, eps), weight, scale, bias, block_n, block_k)


def fp8_norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> Tensor:
    """``silu(first half) * second half`` of :func:`fp8_norm_linear`.

    Args:
        x: [T, K].
        norm_weight: [K].
        eps: Of the norm.
        weight: As of :func:`fp8_linear`, like all that follows; gates come first.
        scale: The same.
        bias: The same.
        block_n: The same.
        block_k: The same.

    Returns:
        [T, N / 2] in the compute dtype, contiguous.
    """
    product = fp8_norm_linear(x, norm_weight, eps, weight, scale, bias, block_n, block_k)
    return silu_and_mul(product)


def fp8_linear_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> None:
    """Add :func:`fp8_linear` to ``residual``.

    Args:
        x: As of :func:`fp8_linear`, like all others.
        residual: [T, N] in the compute dtype.
        weight: The same.
        scale: The same.
        bias: The same.
        block_n: The same.
        block_k: The same.
    """
    residual.add_(fp8_linear(x, weight, scale, bias, block_n, block_k))


def quantise(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Eight bits for each element: [T, K] float8_e4m3fn, and [T, ceil(K / group)] float32."""
    rows, inputs = x.shape
    count = -(-inputs // group)
    wide = F.pad(x.float(), (0, count * group - inputs)).view(rows, count, group)
    # A device multiplies by the inverse of a number that the host knows, which rounds otherwise.
    scales = wide.abs().amax(dim=-1).clamp(min=LEAST_MAGNITUDE) / wide.new_full((), LARGEST)
    # What is too large is no number on some devices.
    numbers = (wide / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return numbers.view(rows, -1)[:, :inputs].contiguous(), scales


def dequantise(numbers: Tensor, scale: Tensor, block_n: int, block_k: int) -> Tensor:
    """[..., N, K] float32: what the numbers stand for."""
    outputs, inputs = numbers.shape[-2:]
    wide = scale.repeat_interleave(block_k, dim=-1)[..., :inputs]
    if block_n > 1:
        wide = wide.repeat_interleave(block_n, dim=-2)[..., :outputs, :]
    return numbers.float() * wide


def fake_fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def fake_fp8_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def fake_fp8_norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    block_n: int,
    block_k: int,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))

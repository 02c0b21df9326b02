import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.reference import reference as silu_and_mul

MIDDLE = 8
"""The number that stands for zero where a weight has no zeros of its own."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring inputs is in each four bits of a word, from the lowest on."""


def w4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """``x @ ((numbers - zeros) * scales).T + bias``: weights of four bits, activations as they are.

    ``packed`` has eight numbers from 0 to 15 in a word, of eight neighbouring inputs of one output,
    in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on. So an output's weights lie side by
    side, and a kernel for few rows reads them in words of 16 bytes, neighbouring threads from
    neighbouring addresses, as it reads a plain weight. And in this order ``word >> 4 * i`` under
    the mask 0x000f000f has two neighbours, 2 i and 2 i + 1, in the halves of a register: one more
    operation (``| 0x43004300``, that is 128 + number in bfloat16; ``| 0x64006400``, 1024 + number,
    in float16) makes them a pair of floating-point numbers in the order in which ``x`` lies.

    Args:
        x: [T, K] in the compute dtype.
        packed: [N, ceil(K / 8)] int32, contiguous.
        scales: [N, ceil(K / group)] in the compute dtype, contiguous.
        zeros: [N, ceil(K / group)] uint8, 0 to 15; None: 8 everywhere.
        bias: [N] in the compute dtype, or None.
        group: Inputs that share a scale and a zero, a multiple of 8.

    Returns:
        [T, N] in the compute dtype, contiguous.
    """
    return F.linear(x, dequantise(packed, scales, zeros, group, x.shape[1]), bias)


def w4_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """:func:`w4_linear` of x after its root mean square norm.

    Args:
        x: [T, K].
        norm_weight: [K].
        eps: Of the norm.
        packed: As of :func:`w4_linear`, like all that follows.
        scales: The same.
        zeros: The same.
        bias: The same.
        group: The same.

    Returns:
        [T, N] in the compute dtype, contiguous.
    """
    return w4_linear(rms_norm(x, norm_weight, eps), packed, scales, zeros, bias, group)


def w4_norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """``silu(first half) * second half`` of :func:`w4_norm_linear`.

    Args:
        x: [T, K].
        norm_weight: [K].
        eps: Of the norm.
        packed: As of :func:`w4_linear`, like all that follows.
        scales: The same.
        zeros: The same.
        bias: The same.
        group: The same.

    Returns:
        [T, N / 2] in the compute dtype, contiguous.
    """
    return silu_and_mul(w4_norm_linear(x, norm_weight, eps, packed, scales, zeros, bias, group))


def w4_linear_add(
    x: Tensor,
    residual: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> None:
    """Add :func:`w4_linear` to ``residual``.

    Args:
        x: As of :func:`w4_linear`, like all others.
        residual: [T, N] in the compute dtype.
        packed: The same.
        scales: The same.
        zeros: The same.
        bias: The same.
        group: The same.
    """
    residual.add_(w4_linear(x, packed, scales, zeros, bias, group))


def dequantise(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, inputs: int
) -> Tensor:
    """[N, inputs] in the dtype of the scales: what the numbers stand for, rounded once."""
    numbers = unpack(packed)[:, :inputs].float()
    middle = MIDDLE if zeros is None else _of_each(zeros.float(), group, inputs)
    return ((numbers - middle) * _of_each(scales.float(), group, inputs)).to(scales.dtype)


def _of_each(values: Tensor, group: int, inputs: int) -> Tensor:
    return values.repeat_interleave(group, dim=1)[:, :inputs]


def unpack(packed: Tensor) -> Tensor:
    """[N, W] int32 to [N, 8 * W] uint8 from 0 to 15, in the order of the inputs."""
    # Not by a list of places: that would be a tensor of the host, which no graph copies from.
    numbers = nibbles(packed).view(len(packed), -1, 8).unbind(2)
    return torch.stack([numbers[ORDER.index(each)] for each in range(8)], dim=2).flatten(1)


def nibbles(words: Tensor) -> Tensor:
    """[N, W] int32 to [N, 8 * W] uint8 from 0 to 15, from the lowest bits of each word on."""
    if words.stride(-1) != 1:
        # Not contiguous(): a last dimension of one is that already, at any stride.
        words = words.clone(memory_format=torch.contiguous_format)
    pairs = words.view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def pack(numbers: Tensor) -> Tensor:
    """[N, K] uint8 from 0 to 15 to [N, ceil(K / 8)] int32; undoes :func:`unpack`."""
    outputs, inputs = numbers.shape
    words = F.pad(numbers, (0, -inputs % 8)).reshape(outputs, -1, 8)[:, :, list(ORDER)]
    pairs = words[:, :, 0::2] | words[:, :, 1::2] << 4
    return pairs.reshape(outputs, -1).view(torch.int32)


def fake_w4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


def fake_w4_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


def fake_w4_norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0] // 2))

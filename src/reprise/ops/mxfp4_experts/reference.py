import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.ops.experts.reference import activation, weighted_sum

GROUP = 32
"""Inputs that share a scale."""
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What codes 0 to 7 stand for (e2m1); 8 to 15 are their negatives."""


def reference(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    limit: float,
) -> Tensor:
    """:func:`reprise.ops.experts` with weights of four bits (OCP Microscaling 1.0, MXFP4).

    Weights are multiplied as what they stand for; activations are not quantised, and sums are
    float32. What an expert computes is rounded to the compute dtype where a feed-forward alone is.

    Args:
        x: [T, D].
        weights: [T, K] float32.
        ids: [T, K] int32; a number that is no expert's adds nothing.
        gate_up: [E, 2*I, D / 2] int8, of each expert the rows of the gate first; the low four bits
            are the even column's.
        gate_up_scale: [E, 2*I, D / 32] uint8: exponents, 127 for 1.
        down: [E, D, I / 2] int8.
        down_scale: [E, D, I / 32] uint8.
        limit: What gates and ups are clamped to, see :func:`reprise.ops.swiglu_clamp`; 0: they are
            not.

    Returns:
        [T, D] in x's dtype, contiguous. A row depends on no other; one without experts is 0.
    """

    def multiplied(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(rows.float(), dequantise(codes, scale)).to(x.dtype)

    def product(expert: int) -> Tensor:
        hidden = activation(multiplied(x, gate_up[expert], gate_up_scale[expert]), limit)
        return multiplied(hidden, down[expert], down_scale[expert])

    return weighted_sum(x, weights, ids, len(gate_up), product)


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """[..., N, K] float32: what codes [..., N, K / 2] with exponents [..., N, K / 32] stand for."""
    both = codes.view(torch.uint8)
    found = torch.stack((both & 15, both >> 4), dim=-1).flatten(-2).int()
    # By bits and not from a table, which would come from the host: no graph copies from there.
    exponent, mantissa = found >> 1 & 3, found & 1
    quarters = torch.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    magnitude = quarters.float() * 0.25
    numbers = torch.where(found < 8, magnitude, -magnitude)
    return numbers * powers(scale).repeat_interleave(GROUP, dim=-1)


def powers(exponents: Tensor) -> Tensor:
    """float32 powers of two of biased exponents (e8m0, as bytes), by bits: 127 is 1, 0 is the
    smallest, 255 is no number."""
    bits = exponents.int() << 23
    bits = torch.where(exponents == 0, 1 << 22, bits)
    return torch.where(exponents == 255, 0x7FC00000, bits).int().view(torch.float32)


def fake(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    limit: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

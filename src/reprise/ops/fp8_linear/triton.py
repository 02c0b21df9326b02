"""Products of eight bits in Triton.

Activations are quantised by a kernel of their own, once for all programs of the product, whose
kernel reads weights meanwhile.
"""

from torch import Tensor

from reprise.ops.fp8_linear.product_kernel import launch_product
from reprise.ops.fp8_linear.quantise_kernel import quantise
from reprise.ops.registry import active_platform


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, block_n: int, block_k: int
) -> Tensor:
    """Shapes as in the reference."""
    platform = active_platform()
    numbers, scales = quantise(x, block_k, platform is not None and platform.multiplies_fp8)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    launch_product(numbers, scales, weight, scale, bias, out, block_n)
    return out

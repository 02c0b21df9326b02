from torch import Tensor

from reprise.ops.grouped_output.product_kernel import launch_groups


def grouped_output(x: Tensor, weight: Tensor) -> Tensor:
    """Shapes as in the reference."""
    out = x.new_empty((len(x), len(weight)))
    launch_groups(x if x.stride(2) == 1 else x.contiguous(), weight, out)
    return out

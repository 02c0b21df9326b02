from torch import Tensor


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """A product of blocks on the diagonal: each group of inputs makes outputs of its own.

    Args:
        x: [T, G, K].
        weight: [G * N, K], the rows of the first group first.

    Returns:
        [T, G * N], contiguous.
    """
    blocks = weight.unflatten(0, (x.shape[1], -1))
    return (x.transpose(0, 1) @ blocks.transpose(1, 2)).transpose(0, 1).flatten(1).contiguous()


def fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))

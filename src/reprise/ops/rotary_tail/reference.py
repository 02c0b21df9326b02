import torch
from torch import Tensor


def reference(
    x: Tensor, positions: Tensor, cos_sin: Tensor, norm_eps: float, inverse: bool
) -> Tensor:
    """Rotate the last channels of heads, by their tokens' positions or back by them.

    Pairs of neighbours rotate (RoFormer, Su et al. 2021, eq. 34), in float32: ``(e, o)`` becomes
    ``(e cos - o sin, o cos + e sin)``. Where values are keys that have been rotated, as in
    DeepSeek-V4, what attention gives is rotated back by the query's position.

    Args:
        x: [T, H, D]; rows may be strided.
        positions: [T] int64.
        cos_sin: [P, R] float32, row p holds cos(p*f) in its first half and sin(p*f) in its second;
            the last R channels of a head rotate.
        norm_eps: Before that each head is divided by its root mean square, with this added to the
            mean; 0: it is not.
        inverse: Rotate back.

    Returns:
        [T, H, D], contiguous.
    """
    wide = x.float()
    if norm_eps:
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm_eps)
    found = rotated(wide, cos_sin[positions].unsqueeze(1), inverse)
    return found.to(x.dtype)


def rotated(wide: Tensor, cos_sin: Tensor, inverse: bool = False) -> Tensor:
    """The last channels of ``wide`` [..., D] float32 rotated by ``cos_sin`` [..., R]."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    if inverse:
        sin = -sin
    size = cos_sin.shape[-1]
    even, odd = wide[..., -size:].unflatten(-1, (-1, 2)).unbind(-1)
    tail = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((wide[..., :-size], tail.flatten(-2)), dim=-1)


def fake(x: Tensor, positions: Tensor, cos_sin: Tensor, norm_eps: float, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)

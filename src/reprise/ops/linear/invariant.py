"""Matrix products on a host whose bits of a row depend on that row alone.

A BLAS chooses kernels by the number of rows, and they sum in different orders. Here every product
is made of tiles of few sizes. The bits are those of a tile of :data:`CANONICAL` rows; another size
is used only if it was seen to give the same, for weights of that shape, when the first of them was
multiplied: kernels are chosen by shapes, not by numbers, so what holds for some rows holds for all.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from reprise.errors import OpError
from reprise.ops.linear.onednn import LARGE
from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.invariant import silu_and_mul

logger = logging.getLogger(__name__)

CANONICAL = 16
"""Rows of the tile whose bits all others must give. BLAS libraries have kernels of their own for
fewer rows."""
OTHERS = (1, 2, 4, 8, 64)
"""Sizes that save work, where they give the same bits."""
_ALIGNMENT = 64
"""Bytes: kernels may be chosen by where operands begin, too."""

_ONEDNN = torch.backends.mkldnn.is_available()

_DIFFERENT = 256
"""Rows of a weight that is tried; those behind them are the same again."""
_sizes: dict[Hashable, tuple[int, ...]] = {}
"""Ascending, by what kernels are chosen by."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments as in the reference.

    Raises:
        OpError: A row gets other bits at other places of a tile.
    """
    result = _product(x, weight)
    return result if bias is None else result.add_(bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return silu_and_mul(linear(x, weight, bias))


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return silu_and_mul(norm_linear(x, norm_weight, eps, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    residual.add_(linear(x, weight, bias))


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(linear(x, weight, None))


def tiles(rows: int, sizes: tuple[int, ...]) -> Iterator[int]:
    """Sizes of tiles that hold so many rows together; the last may have room for more.

    Args:
        rows: Of the product.
        sizes: Ascending.
    """
    while rows > 0:
        least = next((each for each in sizes if each >= rows), sizes[-1])
        size = least
        if least >= 2 * rows or least < rows:
            size = max((each for each in sizes if each <= rows), default=least)
        yield size
        rows -= size


def _product(x: Tensor, weight: Tensor) -> Tensor:
    rows = len(x)
    if rows == 0:
        return x.new_empty(0, len(weight))
    sizes = _sizes_of(weight)
    parts, begin = [], 0
    for size in tiles(rows, sizes):
        tile = _tile(x[begin : begin + size], size)
        parts.append(_multiply(tile, weight)[: rows - begin])
        begin += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tile(rows: Tensor, size: int) -> Tensor:
    """Up to ``size`` rows, with zeros behind them, at an address like any other's."""
    if len(rows) == size and rows.is_contiguous() and rows.data_ptr() % _ALIGNMENT == 0:
        return rows
    found = rows.new_zeros(size, rows.shape[1])
    found[: len(rows)] = rows
    return found


def _multiply(tile: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype is torch.float32 and weight.numel() >= LARGE and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(tile, weight, None, "none", [], "")
    return torch.mm(tile, weight.t())


def _sizes_of(weight: Tensor) -> tuple[int, ...]:
    if not weight.is_contiguous():
        return (CANONICAL,)
    place = weight.data_ptr() % _ALIGNMENT
    key = (*weight.shape, weight.dtype, place, torch.get_num_threads())
    if key not in _sizes:
        _sizes[key] = _seen(weight, place)
    return _sizes[key]


def _seen(weight: Tensor, place: int = 0) -> tuple[int, ...]:
    """Sizes of tiles that give the bits of the canonical one, ascending.

    They are tried on numbers whose products cancel, so that nothing is left of a sum but what was
    lost by rounding: every other order leaves something else, also behind a rounding to few bits.

    Args:
        weight: Its shape and dtype count.
        place: Where it begins, in bytes behind a multiple of the alignment.

    Raises:
        OpError: The canonical one gives equal rows other bits.
    """
    rows, like = _cancelling(weight, place)
    one = rows[:1]
    tiles = rows.split(CANONICAL)
    expected = torch.cat([_multiply(_tile(each, CANONICAL), like) for each in tiles])
    if not _same(_multiply(one.repeat(CANONICAL, 1), like), expected[:1]):
        raise OpError(
            f"batch_invariant=True: products with a weight of {list(weight.shape)} "
            f"{str(weight.dtype).removeprefix('torch.')} give equal rows different bits in this "
            "torch on this processor; leave batch_invariant out"
        )
    found = {CANONICAL}
    for size in OTHERS:
        repeated = _multiply(one.repeat(size, 1), like)
        tried = _multiply(_tile(rows[:size], size), like)
        if _same(repeated, expected[:1]) and _same(tried, expected[:size]):
            found.add(size)
    sizes = tuple(sorted(found))
    logger.debug("products of %s: tiles of %s rows", list(weight.shape), sizes)
    return sizes


def _cancelling(weight: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Rows, and a weight like this one, of which each product is 0 but for rounding."""
    outputs, inputs = weight.shape
    half, most = inputs // 2, max(CANONICAL, *OTHERS)
    make = torch.Generator().manual_seed(0)
    order = torch.randperm(half, generator=make)
    x = torch.randn(most, half, generator=make, dtype=torch.float32).to(weight.dtype)
    w = torch.randn(min(outputs, _DIFFERENT), half, generator=make, dtype=torch.float32).to(
        weight.dtype
    )
    rows = x.new_zeros(most, inputs)
    rows[:, :half], rows[:, half : 2 * half] = x, -x[:, order]
    offset = place // weight.element_size()
    memory = torch.zeros(weight.numel() + offset, dtype=weight.dtype)
    like = memory[offset:].view(outputs, inputs)
    for begin in range(0, outputs, _DIFFERENT):
        some = like[begin : begin + _DIFFERENT]
        some[:, :half], some[:, half : 2 * half] = w[: len(some)], w[: len(some), order]
    return rows, like


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found, expected.expand_as(found))

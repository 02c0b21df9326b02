"""How attention with an equal part of all keys for each program is cut: tiles, warps, programs."""

import functools

from reprise.ops.paged_attention.attend import Config
from reprise.ops.triton_util import INTERPRETED, DeviceLimits, cdiv, next_power_of_2

_FEW_REQUESTS = 16
"""Up to so many, each program gets more warps, and what looks through all requests is smaller."""
_ONE_TILE, _ONE_TILE_OF_SEVERAL = 64, 128
"""Keys of a program that has one tile of them: of one request, and of more."""
_LEAST_HEADS = 4
"""Of a KV head, from which programs have one tile where there are three requests or more. With two,
longer contexts of so many requests were slower when the kernel had that way as well."""
_FEW_OF_CODES = 32
"""The same where keys and values have one byte a channel."""


@functools.cache
def split_config(
    rows: int,
    requests: int,
    head_size: int,
    element_size: int,
    device: DeviceLimits,
    codes: bool = False,
) -> Config:
    """For the split kernel.

    Args:
        rows: Query heads of a KV head times new tokens.
        requests: Of the step.
        head_size: Channels of a head.
        element_size: Bytes of one channel of a query.
        device: Where it runs.
        codes: Keys and values have one byte a channel.
    """
    block_m = max(16, next_power_of_2(rows))
    block_d = next_power_of_2(head_size)
    one_tile = 0
    if requests <= _FEW_REQUESTS and not codes and head_size == max(16, block_d):
        if requests <= 1:
            one_tile = _ONE_TILE
        elif requests == 2 or rows >= _LEAST_HEADS:
            one_tile = _ONE_TILE_OF_SEVERAL
    if INTERPRETED:  # its time goes by the number of steps
        return Config(block_m, 64, 1, 1, one_tile=one_tile)
    if element_size == 4:  # products hold their operands in registers
        return Config(block_m, 16, 8 if block_d > 128 else 4, 2)
    if block_m * block_d > 16 * 128:
        block_n, num_warps, share, one_tile = 64 if block_d <= 128 else 32, 4, 2, 0
    elif requests <= _FEW_REQUESTS:
        block_n, num_warps, share = 32, 4, 3
    else:
        block_n, num_warps, share = 32, 2, 4
    if codes and share > 2:
        # As many bytes on their way as of numbers, and fewer warps to wait for each other.
        few = requests <= _FEW_OF_CODES
        block_n, num_warps, share = (128, 4, 2) if few else (64, 2, 4)
    # Keys and values on their way to a program are all but those in use.
    tile = 2 * block_n * block_d * (1 if codes else element_size)
    deep = share * (2 * tile + 8 * 1024) <= device.shared_memory
    return Config(block_m, block_n, num_warps, 3 if deep else 2, share, one_tile)


@functools.cache
def programs_of(requests: int, most: int) -> int:
    """Programs for each KV head: as many as run at a time, or a few less where requests of equal
    length are then cut nowhere but between programs."""
    if requests == 0:
        return most
    if requests < most:
        even = most // requests * requests
    else:
        even = requests // cdiv(requests, max(1, most))
    return even if even >= 0.9 * most else most


def few_sizes(count: int) -> int:
    """Few sizes, so few compilations. One warp looks through few requests without a barrier."""
    size = _FEW_REQUESTS if count <= _FEW_REQUESTS else 256
    while size < count:
        size *= 4
    return size

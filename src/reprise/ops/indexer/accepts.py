from torch import Tensor

MOST = 1 << 15
"""Rows that a program chooses among: it counts them in half a word."""
LEAST = 4
"""The same: it counts four at a time."""
_CHUNK = 2048
_MOST_CHUNKS = 16
_MOST_GROUPS = 4096


def chunks_of(room: int, top: int, least: int = _CHUNK) -> tuple[int, int]:
    """Rows of a chunk, a power of two, and how many chunks there are of at most ``room`` rows of
    which ``top`` are chosen."""
    alone = room <= 2 * least
    wanted = max(room if alone else least, -(-room // _MOST_CHUNKS), top, LEAST)
    chunk = 1 << (min(MOST, wanted) - 1).bit_length()
    return chunk, -(-room // chunk)


def group_of(room: int, top: int, most: int, least: int) -> int:
    """Rows of which the largest score is kept beside them, between ``least`` and ``most``, if that
    tells what the ``top`` largest of all reach; else 0."""
    group = least
    while group < most and room // group > _MOST_GROUPS:
        group *= 2
    return group if top < room // group <= _MOST_GROUPS else 0


def accepts(keys: Tensor, block_tables: Tensor, out: Tensor, **_: object) -> str | None:
    """Which calls the kernels compute."""
    room, top = block_tables.shape[1] * keys.shape[1], out.shape[1]
    chunks = chunks_of(room, top)[1]
    if top > MOST or (chunks > 1 and chunks * top > MOST):
        return f"{top} of {room} rows are more than these kernels choose"
    return None

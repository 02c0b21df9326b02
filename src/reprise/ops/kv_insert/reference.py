from torch import Tensor

from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.rotary_tail.reference import rotated


def reference(
    kv: Tensor,
    gain: Tensor,
    norm_eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: Tensor,
) -> None:
    """Normalise the one vector that is a token's key and value, rotate its last channels, store it.

    Args:
        kv: [T, D], rows may be strided.
        gain: [D], of the root mean square norm, as ``rms_norm`` takes it.
        norm_eps: Of it.
        positions: [T] int64.
        cos_sin: [P, R] float32, see :func:`reprise.ops.rotary_tail`.
        slots: [T] int64, block * block_size + offset; padding rows point into block 0.
        cache: [N, B, D], written at the tokens' slots.
    """
    rows = rotated(rms_norm(kv, gain, norm_eps).float(), cos_sin[positions])
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows.to(cache.dtype)

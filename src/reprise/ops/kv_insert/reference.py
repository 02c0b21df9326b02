from torch import Tensor

from reprise.ops.latent_rows import store
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
    tail: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Normalise the one vector that is a token's key and value, rotate its last channels, store it.

    Args:
        kv: [T, D], rows may be strided.
        gain: [D], of the root mean square norm, as ``rms_norm`` takes it.
        norm_eps: Epsilon of the norm.
        positions: [T] int64.
        cos_sin: [P, R] float32, see :func:`reprise.ops.rotary_tail`.
        slots: [T] int64, block * block_size + offset; padding rows point into block 0.
        cache: [N, B, D], written at the tokens' slots; or codes [N, B, G, (D - R) / G] of the
            channels that do not rotate.
        tail: [N, B, R], the others, where the cache has codes.
        scales: [N, G, B] float32 of the codes (:mod:`reprise.ops.latent_rows`).
    """
    rows = rotated(rms_norm(kv, gain, norm_eps).float(), cos_sin[positions])
    block = cache.shape[1]
    store(rows.to(kv.dtype), slots // block, slots % block, cache, tail, scales)

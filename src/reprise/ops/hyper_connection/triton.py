"""Hyper-connections in Triton, as two kernels: one multiplies the streams with ``fn``, the other
sums these products, and makes factors and an input of them."""

from torch import Tensor

from reprise.ops.hyper_connection.mix_kernel import mix_options, stream_mix_kernel
from reprise.ops.hyper_connection.sum_kernel import stream_sum_kernel, sum_options
from reprise.ops.triton_util import (
    INTERPRETED,
    cdiv,
    launch,
    launch_options,
    limits,
    next_power_of_2,
)


def hyper_connection(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    gain: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    """Shapes as in the reference."""
    return connect(streams, fn, base, scale, gain, iterations, eps, norm_eps, y, post, comb)


def connect(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
) -> Tensor:
    """``gain`` None: the head, which makes one factor a stream and has no norm."""
    tokens, _, size = streams.shape
    out = streams.new_empty((tokens, size))
    if tokens == 0:
        return out
    values = streams if streams.is_contiguous() else streams.contiguous()
    y, base, scale = y.contiguous(), base.float(), scale.float()
    factors = post if post.is_contiguous() else post.contiguous()
    matrix = comb if comb.is_contiguous() else comb.contiguous()
    rows = len(fn)
    channels, options = mix_options(tokens, size, rows, streams.dtype, limits(streams.device))
    splits = cdiv(size, channels)
    # Behind the sums with fn one of squares; rows that begin where many bytes are read at once.
    width = next_power_of_2(rows + 1)
    found = streams.new_empty((splits, tokens, width), dtype=base.dtype)
    launch(stream_mix_kernel, (splits, cdiv(tokens, options["TOKENS"])))(
        values,
        fn,
        y,
        factors,
        matrix,
        found,
        tokens,
        channels,
        fn.stride(0),
        SIZE=size,
        OUTPUTS=rows,
        WIDTH=width,
        WIDEN=INTERPRETED,
        **options,
        **launch_options(),
    )
    launch(stream_sum_kernel, (tokens, 1 if gain is None else 2))(
        values,
        found,
        base,
        scale,
        gain,
        factors,
        matrix,
        out,
        tokens,
        splits,
        iterations,
        eps,
        norm_eps,
        SIZE=size,
        OUTPUTS=rows,
        WIDTH=width,
        HEAD=gain is None,
        **sum_options(size, splits),
        **launch_options(),
    )
    for ours, given in ((values, streams), (factors, post), (matrix, comb)):
        if ours is not given:
            given.copy_(ours)
    return out

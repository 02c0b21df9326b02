"""Paged attention in Triton: two kernels behind one entry.

``split_kernel`` serves steps in which every request has the same few new tokens (decode,
verification of drafts), ``mixed_kernel`` all others.
"""

from collections.abc import Callable
from typing import Any

from reprise.ops.paged_attention.attend import Call
from reprise.ops.paged_attention.mixed_kernel import launch_mixed
from reprise.ops.paged_attention.split_kernel import launch_split

_MAX_SPLIT_ROWS = 64
"""Query heads of a KV head times new tokens, up to which the split kernel is used."""


def paged_attention(*args: Any, **kwargs: Any) -> None:
    """Arguments as in the reference."""
    bind(*args, **kwargs)


def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    call = Call(*args, **kwargs)
    few = call.query_len > 0 and call.query_len * call.group <= _MAX_SPLIT_ROWS
    return launch_split(call) if few else launch_mixed(call)


paged_attention.bind = bind  # type: ignore[attr-defined]

"""Paged attention that leaves whole prompts to a kernel of the device's vendor.

Such a kernel reads no block table and masks from the first key on, so it computes a request from
its first token on, alone in its step. Keys and values are gathered, which is little beside what is
done with them. All other calls are Triton's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from reprise.ops.paged_attention.attend import Call
from reprise.ops.paged_attention.triton import bind as bind_triton
from reprise.ops.registry import active_platform
from reprise.platforms.base import PromptAttention

LEAST_TOKENS = 1024
"""Of a prompt for which gathering pays."""
WIDEST_HEAD = 128


def paged_attention(*args: Any, **kwargs: Any) -> None:
    """Arguments as in the reference."""
    bind(*args, **kwargs)


def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
    """Compute, and return a function that computes again on the same tensors."""
    call, platform = Call(*args, **kwargs), active_platform()
    attend = None if platform is None else platform.prompt_attention
    if attend is None or not takes(call):
        return bind_triton(*args, **kwargs)
    again = functools.partial(_whole_prompt, call, attend)
    again()
    return again


def takes(call: Call) -> bool:
    """Whether the vendor's kernel computes such a call."""
    return (
        call.prompt >= LEAST_TOKENS
        and call.sliding_window == 0
        and call.soft_cap == 0
        and call.query.dtype is not torch.float32
        and call.query.shape[2] <= WIDEST_HEAD
        and call.key_scales is None
    )


def _whole_prompt(call: Call, attend: PromptAttention) -> None:
    tokens = call.prompt
    blocks = call.block_tables[0, : -(-tokens // call.key_cache.shape[1])]
    keys, values = (
        each.index_select(0, blocks).flatten(0, 1)[:tokens]
        for each in (call.key_cache, call.value_cache)
    )
    attend(call.query, keys, values, call.out, call.scale)


paged_attention.bind = bind  # type: ignore[attr-defined]

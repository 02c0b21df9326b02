"""What a caller may have set for work of its own with torch, and an engine in its thread must not
compute with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

HOST = "cpu"


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """In the ``with`` block ``torch.autocast`` lowers no precision, and tensors that name no device
    are the host's, whatever ``torch.set_default_device`` says."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for kind in (HOST, None if accelerator is None else accelerator.type):
            if kind is not None and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != HOST:
            stack.enter_context(torch.device(HOST))
        yield

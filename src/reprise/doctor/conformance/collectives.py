"""Collectives, on one rank: that the backend is there and does what it says."""

from __future__ import annotations

import torch
import torch.distributed as dist

from reprise.doctor.conformance.contract import Kit, Skipped, contract, need


@contract("collectives")
def collectives_work_on_one_rank(kit: Kit) -> str:
    """The platform's ``dist_backend`` makes a group, reduces, gathers and broadcasts.

    One rank proves no communication, but that the backend loads and takes the device's tensors.
    """
    backend = kit.platform.dist_backend
    if not dist.is_available():
        raise Skipped("this torch is built without torch.distributed")
    if not dist.is_backend_available(backend):
        raise Skipped(f"this torch has no backend {backend!r}")
    if dist.is_initialized():
        raise Skipped("the process already belongs to a group")
    from torch._C._distributed_c10d import HashStore  # only where torch has distributed

    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        x = kit.full(1024, value=3.0)
        for reduction in (dist.ReduceOp.SUM, dist.ReduceOp.MIN):
            dist.all_reduce(x, op=reduction)
        dist.broadcast(x, src=0)
        gathered = [torch.zeros_like(x)]
        dist.all_gather(gathered, x)
        kit.platform.synchronize()
        need(bool(x.eq(3).all()), f"3 reduced over one rank is {float(x[0])}")
        need(bool(gathered[0].eq(3).all()), f"3 gathered is {float(gathered[0][0])}")
    finally:
        dist.destroy_process_group()
    return f"{backend}: all_reduce, broadcast, all_gather"

"""Memory numbers: the size of the KV cache is computed from them."""

from __future__ import annotations

import torch

from reprise.doctor.conformance.contract import Kit, Skipped, contract, need

MIB = 1 << 20
BLOCK = 256 * MIB


@contract("memory")
def memory_has_sane_limits(kit: Kit) -> str:
    """Free memory is above 0 and at most the total; the cache's budget falls as steps grow.

    A budget that ignores the activations would let the first large step run out of memory.
    """
    platform = kit.platform
    info = platform.memory_info()
    need(0 < info.free <= info.total, f"free {info.free} of {info.total} bytes")
    budgets = [platform.cache_budget(0.8, size) for size in (0, info.free // 2, 2 * info.free)]
    need(budgets[0] > 0, f"no memory for a cache: the budget is {budgets[0]} bytes")
    need(budgets[0] <= info.total, f"a budget of {budgets[0]} bytes on {info.total}")
    need(
        budgets[0] >= budgets[1] >= budgets[2] and budgets[0] > budgets[2],
        f"budgets {budgets} do not fall as activations grow",
    )
    return f"{info.free // MIB} of {info.total // MIB} MiB free"


@contract("memory")
def memory_counters_follow_tensors(kit: Kit) -> str:
    """Allocated bytes rise with a tensor and fall with it; the peak stays until it is reset.

    The activations of the largest step are measured with these.
    """
    platform = kit.platform
    if not platform.counts_memory:
        raise Skipped("the platform counts no memory (counts_memory is false)")
    size = 16 * MIB
    platform.synchronize()
    platform.reset_peak_memory()
    before = platform.memory_allocated()
    x = torch.empty(size, dtype=torch.uint8, device=platform.device)
    during, reserved = platform.memory_allocated(), platform.memory_reserved()
    need(during - before >= size, f"allocated rose by {during - before} for {size} bytes")
    need(during - before <= 2 * size, f"allocated rose by {during - before} for {size} bytes")
    need(reserved >= during, f"reserved ({reserved}) is less than allocated ({during})")
    del x
    after, peak = platform.memory_allocated(), platform.peak_memory_allocated()
    need(after <= during - size, f"allocated fell by {during - after} when {size} bytes died")
    need(peak >= during, f"the peak ({peak}) is below what was allocated ({during})")
    platform.reset_peak_memory()
    peak = platform.peak_memory_allocated()
    need(peak < during, f"the peak is {peak} after its reset and {after} are allocated")
    return "allocated, reserved, peak"


@contract("memory")
def memory_free_follows_the_device(kit: Kit) -> str:
    """Free memory falls when the device gives some out and rises when it gets it back.

    Only where graph memory is measured by it (``graph_memory = "measure"``).
    """
    platform = kit.platform
    if platform.graph_memory != "measure":
        raise Skipped(f"not measured here: {platform.graph_memory_reason}")
    platform.empty_cache()
    before = platform.memory_info().free
    x = torch.empty(BLOCK, dtype=torch.uint8, device=platform.device)
    during = platform.memory_info().free
    del x
    platform.synchronize()
    platform.empty_cache()
    after = platform.memory_info().free
    need(before - during >= BLOCK * 0.9, f"free fell by {before - during} for {BLOCK} bytes")
    need(after - during >= BLOCK * 0.9, f"free rose by {after - during} when {BLOCK} bytes died")
    return f"{(before - during) // MIB} MiB out, {(after - during) // MIB} MiB back"

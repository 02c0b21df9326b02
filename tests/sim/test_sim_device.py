"""The device: asynchronous, with memory of its own, and never silent about what it cannot do."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from reprise_sim import device as sim

LARGE = 1 << 20


def busy(platform, milliseconds: float = 50.0) -> None:
    """Keep the current stream busy."""
    x = torch.ones(1, device=platform.device)
    sim.launch("nap", lambda _: time.sleep(milliseconds / 1e3), [x], [])


def test_ops_compute_what_the_cpu_computes(platform) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 5), torch.randn(5, 6)
    index = torch.tensor([3, 0, 6])
    for op in (
        lambda x, y, i: x @ y,
        lambda x, y, i: x.softmax(-1).sum(0),
        lambda x, y, i: x[i] * 2 + 1,
        lambda x, y, i: x.index_add(0, i, x[i]).topk(2).indices,
        lambda x, y, i: x.masked_fill(x > 0, -1).sort(-1).values,
        lambda x, y, i: torch.cat([x, x.flip(0)])[::2].t().contiguous(),
        lambda x, y, i: x[x > 0],
        lambda x, y, i: x.nonzero(),
        lambda x, y, i: x.to(torch.bfloat16).cumsum(0),
    ):
        there = op(x.to(platform.device), y.to(platform.device), index.to(platform.device))
        assert there.device == platform.device
        assert torch.equal(there.cpu(), op(x, y, index))


def test_shapes_that_are_known_are_those_of_such_arguments(platform) -> None:
    """What a meta kernel has said is kept; it says something else of whatever differs here."""
    for kind in (torch.float32, torch.int64):
        for x in (torch.arange(12, dtype=kind).view(3, 4), torch.ones(2, 2, dtype=kind)):
            for y in (x, x.t()):
                for op in (
                    lambda y: y // 2,
                    lambda y: y // 2.5,
                    lambda y: torch.div(y, 3, rounding_mode=None),
                    lambda y: torch.div(y, 3, rounding_mode="floor"),
                    lambda y: y.diff(n=1, dim=0),
                    lambda y: y.diff(n=1, dim=1),
                    lambda y: y.roll(1, 0),
                    lambda y: y.cumsum(0, dtype=torch.float64),
                    lambda y: y.sum(-1, keepdim=True),
                    lambda y: y.sum(-1),
                    lambda y: torch.stack([y, y + 1])[1],
                    lambda y: torch.full_like(y, 2).tril(),
                ):
                    there, expected = op(y.to(platform.device)), op(y)
                    assert (there.dtype, there.stride()) == (expected.dtype, expected.stride())
                    assert torch.equal(there.cpu(), expected)
    x = torch.ones(3, dtype=torch.int64)
    assert (x.to(platform.device) // 2.5).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert (x.to(platform.device) // 2.5).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_attention_of_torch_is_the_plain_one(platform) -> None:
    """No fused kernel of others is called, which would run at once."""
    x = torch.randn(1, 2, 7, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    there = x.to(platform.device)
    got = torch.nn.functional.scaled_dot_product_attention(there, there, there)
    assert torch.equal(got.cpu(), expected)


def test_work_is_queued_and_reading_waits(platform) -> None:
    x, go_on = torch.zeros(4, device=platform.device), threading.Event()
    platform.synchronize()
    sim.launch("held", lambda _: go_on.wait(100), [x], [])
    x.add_(1)
    # The host has not waited; a number that is read before this one was added would be 0.
    threading.Timer(0.2, go_on.set).start()
    assert x.tolist() == [1] * 4
    assert go_on.is_set()


def test_only_pinned_memory_is_copied_asynchronously(platform) -> None:
    x = torch.arange(8.0, device=platform.device)
    pinned, plain = torch.zeros(8, pin_memory=True), torch.zeros(8)
    assert pinned.is_pinned()
    assert not plain.is_pinned()
    for target, wanted in ((pinned, 0.0), (plain, 7.0)):
        busy(platform)
        target.copy_(x, non_blocking=True)
        assert float(target[7]) == wanted or target is pinned
        event = platform.event()
        event.record(platform.current_stream())
        event.synchronize()
        assert float(target[7]) == 7.0
    # What is not pinned may be written as soon as the call returns.
    plain.fill_(1.0)
    busy(platform)
    x.copy_(plain, non_blocking=True)
    plain.fill_(2.0)
    assert x.tolist() == [1.0] * 8


def test_pinned_memory_lives_as_long_as_copies_use_it(platform) -> None:
    x = torch.zeros(LARGE, device=platform.device)
    busy(platform)
    x.copy_(torch.ones(LARGE, pin_memory=True), non_blocking=True)
    others = [torch.zeros(LARGE, pin_memory=True) for _ in range(2)]
    assert float(x.sum()) == LARGE
    del others


def test_freed_memory_is_overwritten_in_the_order_of_its_stream(platform) -> None:
    x, out = torch.ones(LARGE, device=platform.device), torch.zeros(LARGE, device=platform.device)
    busy(platform)
    out.copy_(x)
    address = x.data_ptr()
    del x  # the copy is still queued, and comes first
    again = torch.empty(LARGE, device=platform.device)
    assert again.data_ptr() == address
    assert bool(again.isnan().all())
    assert float(out.sum()) == LARGE


def test_a_stream_that_is_named_keeps_memory(platform) -> None:
    side = platform.stream()
    side.wait_stream(platform.current_stream())
    x = torch.ones(LARGE, device=platform.device)
    address = x.data_ptr()
    side.wait_stream(platform.current_stream())
    go_on = threading.Event()
    with platform.use_stream(side):
        sim.launch("held", lambda _: go_on.wait(100), [x], [])
        total = x.sum()
    x.record_stream(side)
    del x
    assert torch.empty(LARGE, device=platform.device).data_ptr() != address
    go_on.set()
    side.synchronize()
    assert float(total) == LARGE
    assert torch.empty(LARGE, device=platform.device).data_ptr() == address


def test_a_device_has_so_much_memory(platform) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"sim:0: \d+ bytes are asked for"):
        torch.empty(1 << 40, device=platform.device)
    before = platform.memory_allocated()
    x = torch.empty(LARGE, device=platform.device)
    assert platform.memory_allocated() - before == 4 * LARGE
    del x
    assert platform.memory_allocated() == before


def test_memory_numbers_can_be_wrong(platform) -> None:
    platform.empty_cache()
    for numbers in ("late", "negative"):
        with sim.configured(numbers=numbers):
            platform.memory_info()
            before = platform.memory_info().free
            x = torch.empty(64 << 20, dtype=torch.uint8, device=platform.device)
            assert platform.memory_info().free >= before
            del x
            platform.empty_cache()
    with sim.configured(numbers="lost"), pytest.raises(RuntimeError, match="driver"):
        platform.memory_info()


def test_what_cannot_be_queued_is_named(platform) -> None:
    x = torch.zeros(4, device=platform.device)
    library = torch.library.Library("simtest", "DEF")
    library.define("shapeless(Tensor x) -> Tensor")
    library.impl("shapeless", lambda x: x.clone(), "CPU")
    with pytest.raises(NotImplementedError, match="sim cannot queue simtest::shapeless"):
        torch.ops.simtest.shapeless(x)
    with pytest.raises(RuntimeError, match=r"aten::\w+.*a tensor of shape \[4\] is on cpu"):
        torch.where(x > 0, x, torch.ones(4))


def test_a_kernel_that_fails_is_named_by_the_next_wait(platform) -> None:
    x = torch.zeros(4, device=platform.device)
    x.index_select(0, torch.tensor([9], device=platform.device))
    with pytest.raises(RuntimeError, match="aten::index_select failed when it ran"):
        platform.synchronize()
    assert x.add_(1).tolist() == [1] * 4


def test_a_wait_is_bounded_and_names_what_it_waits_for(platform) -> None:
    begun, done = threading.Event(), threading.Event()

    def endless(_) -> None:
        begun.set()
        done.wait(100)

    x = torch.ones(1, device=platform.device)
    platform.synchronize()
    before = dict(sim.core.settings())["timeout"]
    sim.configure(timeout=0.2)
    try:
        sim.launch("endless", endless, [x], [])
        assert begun.wait(100)
        with pytest.raises(RuntimeError, match=r"has waited 0.2 s .* runs endless"):
            platform.synchronize()
    finally:
        done.set()
        sim.configure(timeout=before)
    assert float(x) == 1


def test_devices_are_apart_and_copies_between_them_are_ordered(platform) -> None:
    assert torch.accelerator.device_count() == 2
    first, second = torch.device("sim:0"), torch.device("sim:1")
    x = torch.zeros(LARGE, device=first)
    busy(platform)
    x.fill_(3)
    y = x.to(second)
    x.fill_(4)
    assert float(y.mean()) == 3
    with pytest.raises(RuntimeError, match="tensors on sim:0 and sim:1"):
        torch.mm(x.view(1024, -1), y.view(-1, 1024))


def test_random_numbers_follow_the_seed(platform) -> None:
    torch.manual_seed(5)
    first = torch.randn(16, device=platform.device)
    torch.manual_seed(5)
    assert torch.equal(first, torch.randn(16, device=platform.device))
    assert not torch.equal(first, torch.randn(16, device=platform.device))


def test_delays_follow_the_seed_and_change_nothing(platform) -> None:
    results = []
    for seed in (0, 1, 2):
        with sim.configured(seed=seed):
            x = torch.arange(64.0, device=platform.device)
            for _ in range(20):
                x = (x * 1.5 + 1).flip(0)
            results.append(x.tolist())
    assert results[0] == results[1] == results[2]

"""Every fault, wherever it can be expressed, is caught, its op is named, and no step is wrong."""

from __future__ import annotations

import pytest
import torch

from reprise import platforms
from reprise.graphs.guard import Guard, Scope
from reprise.graphs.verify import examine
from reprise.graphs.verify_mode import VerifyMode
from reprise.ops import all_ops
from reprise.ops.table import op_memory
from reprise.platforms.device_graph import capturing, in_capture_pass
from reprise.shape import StepShape
from reprise.testing import faults
from reprise.testing.faults.base import Fault

pytestmark = pytest.mark.races  # some faults are races

OPS = ("paged_attention", "rotary_cache", "linear_add")
EXECUTORS = ("full", "breakable")
STEPS = (StepShape.decode(3), StepShape.mixed(20, 3))


def steps_are_right(runner, toy):
    caches = [each for layer in toy.model.layers for each in (layer.key_cache, layer.value_cache)]
    for shape in STEPS:
        toy.fill(shape, 5)
        before = [each.clone() for each in caches]
        bucket = runner.bucket_graphs.holding(shape).shape
        graph = runner.bucket_graphs.holding(shape).graph
        if graph is not None:
            toy.pad(shape, bucket)
        expected = toy.eager(bucket if graph is not None else shape)[: shape.num_tokens]
        written = [each[1:].clone() for each in caches]
        for cache, values in zip(caches, before, strict=True):
            cache.copy_(values)
        got = runner.run(shape)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
        if runner.verify.canary or graph is not None:
            assert all(
                torch.allclose(a, b[1:], atol=1e-2) for a, b in zip(written, caches, strict=True)
            )


def exists(fault, op, executor):
    platform = platforms.resolve("cpu")
    return faults.FAULTS[fault].inexpressible(all_ops()[op], executor, platform) is None


@pytest.mark.covering(2, where=exists)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", faults.RECORDED)
def test_faults_are_caught_at_start_up(toy, make_runner, platform, fault, op, executor, caplog):
    reason = faults.FAULTS[fault].inexpressible(all_ops()[op], executor, platform)
    if reason is not None:
        pytest.skip(reason)
    with faults.inject(fault, toy.ops, op):
        runner = make_runner(toy, executor, decode=(4,), mixed=(32,))
        runner.captures.capture_all()
        steps_are_right(runner, toy)
    for info in runner.report().graphs:
        assert info.quarantined is not None
        assert f"{op} #" in info.quarantined, info.quarantined
        # A break op that is broken inside graphs alone is sound between them.
        sound = executor == "full" and all_ops()[op].break_op
        assert info.executor == ("breakable" if sound else "none")
        assert info.verified == sound
    assert f"{op} #" in caplog.text


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("begun", [0, 1])
def test_a_fault_that_comes_and_goes_is_traced(toy, make_runner, begun, executor):
    """Whichever replays are the wrong ones, the search meets one of them."""
    shape = StepShape.decode(3)
    with faults.inject("wrong_every_second", toy.ops, "rotary_cache") as fault:
        fault.active.fill_(False)
        runner = make_runner(toy, executor, decode=(4,), mixed=())
        runner.captures.capture_all()
        bucket = runner.bucket_graphs.holding(shape)

        def fill() -> None:
            toy.fill(shape, 5)
            toy.pad(shape, bucket.shape)

        fault.active.fill_(True)
        fault.count.fill_(begun)
        with torch.inference_mode(), toy.ops.activate():
            place = runner.judge.locate(bucket, shape, fill)
    assert place is not None
    assert place.op.startswith("rotary_cache #")


@pytest.mark.parametrize(
    ("fault", "op", "executor"),
    [
        ("stale_scalar", "paged_attention", "full"),
        ("stale_scalar", "rotary_cache", "breakable"),
        ("stale_pointer", "paged_attention", "full"),
        ("stale_pointer", "silu_and_mul", "breakable"),
        ("fresh_allocation", "paged_attention", "breakable"),
        ("unwritten_output", "linear_add", "full"),
        ("unwritten_output", "silu_and_mul", "breakable"),
        ("wrong_extent", "paged_attention", "full"),
        ("dtype_drift", "rotary_cache", "full"),
        ("dtype_drift", "silu_and_mul", "breakable"),
        ("dirty_memory", "paged_attention", "full"),
        ("dirty_memory", "silu_and_mul", "breakable"),
    ],
)
def test_faults_are_caught_by_the_first_canary(toy, make_runner, fault, op, executor, caplog):
    with faults.inject(fault, toy.ops, op):
        verify = VerifyMode(startup=False, canary=1)
        runner = make_runner(toy, executor, decode=(4,), mixed=(32,), verify=verify)
        runner.captures.capture_all()
        assert runner.report().quarantined == []
        steps_are_right(runner, toy)
    report = runner.report()
    assert report.canary_failures == 2
    for info in report.graphs:
        assert info.executor == "none"
        assert f"{op} #" in info.quarantined, info.quarantined
    assert f"{op} #" in caplog.text


def test_what_ops_keep_is_as_before_a_failed_canary(toy, make_runner, monkeypatch):
    with faults.dirty_memory(toy.ops, "silu_and_mul") as fault:
        verify = VerifyMode(startup=False, canary=1)
        runner = make_runner(toy, "full", decode=(4,), mixed=(), verify=verify)
        runner.captures.capture_all()
        # Finding the op captures anew, which on a CPU does the work, fault included.
        monkeypatch.setattr(runner.judge, "where", lambda *args: "")
        toy.fill(StepShape.decode(4), 3)
        before = fault.kept.clone()
        runner.run(StepShape.decode(4))
        assert runner.report().canary_failures == 1
        assert torch.equal(fault.kept, before)


@pytest.mark.parametrize("raises", [False, True])
def test_what_ops_keep_is_as_before_a_failed_probe(toy, make_runner, monkeypatch, raises):
    with faults.dirty_memory(toy.ops, "silu_and_mul") as fault:
        runner = make_runner(toy, "full", decode=(4,), mixed=(), verify="off")
        runner.captures.capture_all()
        (bucket,) = runner.bucket_graphs.values()
        replay = bucket.graph.replay

        def failing() -> None:
            replay()
            raise RuntimeError("out of memory")

        def probe() -> str:
            shape = bucket.shape
            with torch.inference_mode(), toy.ops.activate():
                return examine(
                    toy, Guard(toy), bucket.graph, shape, shape, toy.model, Scope(),
                    bound=None, keep=False,
                ).told  # fmt: skip

        toy.fill(bucket.shape, 3)
        before = fault.kept.clone()
        if raises:
            monkeypatch.setattr(bucket.graph, "replay", failing)
            assert "RuntimeError: out of memory" in probe()
        else:
            assert "memory of ops" in probe()
        assert torch.equal(fault.kept, before)


def test_disorder_from_between_two_ops_is_not_blamed_on_the_next(toy, make_runner):
    """The first call of the first capture alone leaves it: a capture op by op does not show it."""

    class Once(faults.DirtyMemory):
        name = "dirty_once"
        calls = 0

        def run(self, named):
            if capturing():
                self.calls += 1
                if self.calls == 1:
                    self.kept.add_(1)
            return self.proceed(named)

    toy.ops.functions["silu_and_mul"] = Once(toy.ops, all_ops()["silu_and_mul"])
    runner = make_runner(toy, "breakable", decode=(4,), mixed=())
    runner.captures.capture_all()
    (info,) = runner.report().graphs
    assert "between paged_attention #0 and paged_attention #1" in info.quarantined
    assert "memory of ops (dirty_once silu_and_mul)" in info.quarantined


@pytest.mark.parametrize(
    ("op", "executors"),
    [
        ("silu_and_mul", {"mixed": "none", "decode": "none"}),
        # A break op runs eagerly between segments: the next graph finds what it has made.
        ("paged_attention", {"mixed": "breakable", "decode": "full"}),
    ],
)
def test_what_ops_keep_is_not_made_under_capture(toy, make_runner, op, executors):
    """It would lie in the pool, which comparisons overwrite: eager steps after it would be wrong,
    and other graphs be refused for that."""

    class Late(Fault):
        name = summary = "late"

        def run(self, named):
            # As where no pass before a capture has made such a call.
            if in_capture_pass() and "late" not in op_memory():
                op_memory()["late"] = torch.zeros(4, device=toy.platform.device)
            return self.proceed(named)

    toy.ops.functions[op] = Late(toy.ops, all_ops()[op])
    runner = make_runner(toy, "full", decode=(4,), mixed=(32,))
    runner.captures.capture_all()
    graphs = runner.report().graphs
    assert {each.phase: each.executor for each in graphs} == executors
    for each in graphs:
        assert each.verified == (each.executor != "none")
        assert ("makes 'late' under capture" in (each.quarantined or "")) == (
            each.executor != "full"
        )
    steps_are_right(runner, toy)


def test_a_short_context_does_not_show_a_wrong_extent(toy, make_runner):
    """Which is why the first probe has the longest one."""
    with faults.wrong_extent(toy.ops, "paged_attention"):
        runner = make_runner(toy, "full", decode=(4,), mixed=(), verify="off")
        runner.captures.capture_all()
        for longest, right in ((faults.WrongExtent.limit, True), (100, False)):
            toy.fill(StepShape.decode(4), 3, longest)
            expected = toy.eager(StepShape.decode(4))
            assert torch.equal(runner.run(StepShape.decode(4)), expected) == right


def test_a_fault_ends_with_its_context(toy):
    before = dict(toy.ops.functions)
    for name in faults.FAULTS:
        toy.ops.functions["rms_norm"]
        with getattr(faults, name)(toy.ops, "paged_attention") as fault:
            assert toy.ops.functions["paged_attention"] is fault
            assert fault.summary
    toy.ops.functions.pop("rms_norm")
    assert {**toy.ops.functions, **before} == dict(toy.ops.functions)
    assert not toy.ops.memory


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_eager_execution_stays_right(toy, fault):
    shape = StepShape.mixed(20, 3)
    toy.fill(shape, 2)
    expected = toy.eager(shape)
    for op in (*OPS, "silu_and_mul"):
        if faults.FAULTS[fault].inexpressible(all_ops()[op], "full", toy.platform) and (
            faults.FAULTS[fault].inexpressible(all_ops()[op], "breakable", toy.platform)
        ):
            continue
        toy.fill(shape, 2)
        with faults.inject(fault, toy.ops, op):
            assert torch.equal(toy.eager(shape), expected), op

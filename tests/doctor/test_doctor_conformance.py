"""The conformance kit: this device keeps every contract, and broken platforms are found out."""

from __future__ import annotations

import functools
import json
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import copied_inputs
from safetensors.torch import load_file, save_file

from reprise.cli import ending
from reprise.doctor import conformance as kit
from reprise.doctor.conformance import invariance, operations
from reprise.doctor.conformance.contract import Contract
from reprise.loading import checkpoint
from reprise.loading.checkpoint import DEMO_MODEL
from reprise.runner import arena
from reprise.testing.faults import FAULTS

BROKEN = {
    "stale-graphs": "graphs_replay_fresh_inputs",
    "own-pools": "graphs_share_a_pool",
    "careless-capture": "graphs_refuse_host_reads",
    "stopped-clock": "events_time_work",
    "hasty-events": "events_order_work",
    "still-counters": "memory_counters_follow_tensors",
    "greedy-cache": "memory_has_sane_limits",
}


def two_layers(path):
    """The demo model without its upper layers, which are like the others."""
    model = json.loads((DEMO_MODEL / "config.json").read_text())
    del model["layer_types"]
    (path / "config.json").write_text(json.dumps({**model, "num_hidden_layers": 2}))
    weights = load_file(DEMO_MODEL / "model.safetensors")
    kept = {name: each for name, each in weights.items() if not re.search(r"layers\.[2-9]", name)}
    save_file(kept, path / "model.safetensors")
    return path


TRIED_HERE_ALONE = ("state_committed_twice",)
"""Faults that no other test plants in a graph of a model."""


def only_in_long_runs():
    """Contracts that short runs on the CPU leave out: of faults one of each kind is tried in each
    model that has it, since each is caught in tests of its own; of compiled graphs too, and of
    matrix products in Triton's interpreter one of each format is captured, or tried in batches."""
    kinds = set()
    for name, fault in FAULTS.items():
        kind = fault.caught, fault.shows_in, fault.traced, fault.needs, fault.reads
        kind += (str(fault.engine_options),)
        if kind in kinds and name not in TRIED_HERE_ALONE:
            yield f"fault_is_caught:{name}"
        kinds.add(kind)
    yield "executor_is_exact:compiled"
    for name in ("linear_add", "norm_linear", "norm_gated_linear"):
        yield from (f"op_can_be_captured:{each}_{name}" for each in ("fp8", "w4"))
        yield from (f"op_is_batch_invariant:{each}_{name}" for each in ("fp8", "w4"))
    yield from ("op_can_be_captured:experts", "op_can_be_captured:experts_add")
    yield "op_is_batch_invariant:sample"


LONG = set(only_in_long_runs())
CHOSEN = [
    pytest.param(each, marks=[pytest.mark.long] * (each in LONG)) for each in kit.CONTRACTS
]  # fmt: skip

pytestmark = pytest.mark.timeout(900)  # all contracts run for the first test


@pytest.fixture(scope="module")
def report(device, tmp_path_factory, pytestconfig):
    """Of the contracts. They make some hundred graphs of the demo model: in short runs of a part
    of it. On the CPU ops have every eighth case in one type, in batches of two sizes."""
    chosen = kit.select()
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            # Triton's interpreter takes half an hour, and rounds other types in ways of its own.
            patch.setattr(operations, "MANY", 17)
            patch.setattr(operations, "DTYPES", (torch.float32,))
            cases = operations._cases
            patch.setattr(operations, "_cases", lambda *given: cases(*given)[::8])
            # A few rows and more than any tile has; the sizes between take most of the time.
            patch.setattr(invariance, "SIZES", (3, 33))
        if device == "cpu" and not pytestconfig.getoption("--long"):
            for further in ("_batches", "_gives_memory_of_its_own"):
                patch.setattr(operations, further, lambda *_: {})
            patch.setattr(checkpoint, "DEMO_MODEL", two_layers(tmp_path_factory.mktemp("demo")))
            chosen = [each for each in chosen if each.name not in LONG]
        return kit.conformance(device, {}, chosen)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_device_keeps_the_contract(report, name):
    (outcome,) = (each for each in report.outcomes if each.name == name)
    if outcome.verdict == "skip":
        pytest.skip(outcome.detail)
    assert outcome.verdict == "pass", outcome.detail
    assert outcome.detail


def test_every_contract_explains_itself():
    for each in kit.CONTRACTS.values():
        assert each.summary.endswith("."), each.name
        assert each.explanation, each.name


def test_every_fault_and_every_op_has_its_contract():
    from reprise.ops import all_ops

    assert {f"fault_is_caught:{each}" for each in FAULTS} <= set(kit.CONTRACTS)
    for name in all_ops():
        assert f"op_matches_reference:{name}" in kit.CONTRACTS
        assert f"op_is_deterministic:{name}" in kit.CONTRACTS
        assert f"op_is_batch_invariant:{name}" in kit.CONTRACTS
        if all_ops()[name].break_op:
            assert f"op_leaves_zeros:{name}" in kit.CONTRACTS


def test_ops_know_the_platform_that_they_are_tried_on(platform, device, monkeypatch):
    """Else kernels would be tried without programmatic dependent launch, and used with it."""
    from reprise.ops import all_ops
    from reprise.ops.implementation import Implementation
    from reprise.ops.registry import active_platform

    seen = []

    def spy(logits):
        seen.append(active_platform())
        return logits.argmax(dim=1)

    op = all_ops()["argmax"]
    monkeypatch.setattr(op, "implementations", {
        "reference": op.implementations["reference"],
        "spy": Implementation("argmax", "spy", spy),
    })  # fmt: skip
    kit.CONTRACTS["op_matches_reference:argmax"].check(kit.Kit(platform, device))
    assert seen
    assert all(each is platform for each in seen)


def keeps_padding(reference, **named):
    before = named["out"].clone()
    reference(**named)
    behind = named["query_start_loc"][-1]
    named["out"][behind:] = before[behind:]


def keeps_empty_rows(reference, **named):
    before = named["out"].clone()
    reference(**named)
    for row, length in enumerate(named["seq_lens"].tolist()):
        begin, end = named["query_start_loc"][row : row + 2].tolist()
        if length == 0:
            named["out"][begin:end] = before[begin:end]


def averages_nothing(reference, **named):
    """Divides by the length, as a softmax over no key does."""
    reference(**named)
    for row, length in enumerate(named["seq_lens"].tolist()):
        begin, end = named["query_start_loc"][row : row + 2].tolist()
        named["out"][begin:end] *= named["seq_lens"][row] / length if length else torch.nan


def lets_inputs_through(reference, **named):
    reference(**named)
    named["out"] += named["query"] * 0


def reads_its_neighbour(reference, **named):
    reference(**named)
    named["out"][0] *= (named["seq_lens"][1] > 0) + 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (keeps_padding, "holds in places what it held before"),
        (keeps_empty_rows, "holds in places what it held before"),
        (averages_nothing, "is not zero though all lengths are"),
        (lets_inputs_through, "is not zero though all lengths are"),
        (reads_its_neighbour, "request 1 of length 0, out: differs by"),
    ],
)
@pytest.mark.parametrize("name", ["vendor", "reference"])
def test_rows_without_tokens_that_leave_something_are_found(
    platform, device, monkeypatch, wrong, told, name
):
    from reprise.ops import all_ops
    from reprise.ops.implementation import Implementation

    op = all_ops()["paged_attention"]
    reference = op.implementations["reference"]
    broken = Implementation(op.name, name, functools.partial(wrong, reference.function))
    monkeypatch.setattr(op, "implementations", {"reference": reference, name: broken})
    with pytest.raises(kit.Broken, match=f"^{name}, case .*{told}"):
        kit.CONTRACTS["op_leaves_zeros:paged_attention"].check(kit.Kit(platform, device))


def writes_its_input(reference, **named):
    result = reference(**named)
    next(each for each in named.values() if isinstance(each, torch.Tensor)).neg_()
    return result


def returns_the_same_memory(reference, *, kept={}, **named):  # noqa: B006 - that is the fault
    result = reference(**named)
    return kept.setdefault((result.shape, result.dtype), result).copy_(result)


def returns_its_input(reference, **named):
    return named["x"].copy_(reference(**named))


def forgets_rows_behind_a_tile(reference, **named):
    result = reference(**named)
    (named["out"] if result is None else result)[16:] = 0
    return result


def cannot_be_alone(reference, **named):
    reference(**named)
    if len(named["seq_lens"]) == 1:
        named["out"].zero_()


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("rms_norm", writes_its_input, "wrong writes x, which rms_norm does not declare"),
        ("silu_and_mul", returns_the_same_memory, "results of two calls lie in the same memory"),
        ("rms_norm", returns_its_input, "writes x|lies in memory of its arguments"),
        ("linear", forgets_rows_behind_a_tile, "67 of its rows, result: differs by"),
        ("paged_attention", forgets_rows_behind_a_tile, "67 of its rows, out: differs by"),
        ("paged_attention", cannot_be_alone, "1 of its rows, out: differs by"),
    ],
)
def test_an_implementation_that_no_caller_could_use_is_found(
    platform, device, monkeypatch, name, wrong, told
):
    """All of them are right about what a single call of a few rows gives."""
    from reprise.ops import all_ops
    from reprise.ops.implementation import Implementation

    op = all_ops()[name]
    reference = op.implementations["reference"]
    broken = Implementation(name, "wrong", functools.partial(wrong, reference.function))
    monkeypatch.setattr(op, "implementations", {"reference": reference, "wrong": broken})
    with pytest.raises(kit.Broken, match=told):
        kit.CONTRACTS[f"op_matches_reference:{name}"].check(kit.Kit(platform, device))


def test_the_record_is_complete(report, device, pytestconfig):
    short = device == "cpu" and not pytestconfig.getoption("--long")
    tried = len(kit.CONTRACTS) - (len(LONG) if short else 0)
    assert set(kit.CONTRACTS) > LONG
    data = json.loads(json.dumps(report.to_dict()))
    assert data["conforms"] is not report.failed
    assert data["platform"]
    assert data["device_name"]
    assert sum(data["counts"].values()) == tried == len(data["contracts"])
    assert {each["verdict"] for each in data["contracts"]} <= {"pass", "fail", "skip"}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.usefixtures("broken_platforms")
def test_a_broken_platform_fails_and_the_contract_is_named(name, invoke):
    groups = [part for each in ("order", "memory", "graphs") for part in ("--only", each)]
    result = invoke("doctor", "conformance", "--device", name, *groups, "--json")
    assert result.exit_code == 1, result.output
    assert len(result.stdout.splitlines()) == 1
    data = json.loads(result.stdout)
    assert not data["conforms"]
    assert data["platform"] == name
    failed = {each["name"]: each for each in data["contracts"] if each["verdict"] == "fail"}
    assert BROKEN[name] in failed
    assert failed[BROKEN[name]]["detail"]
    if name not in ("stale-graphs", "hasty-events"):
        assert len(failed) == 1, failed
    table = invoke("doctor", "conformance", "--device", name, "--only", BROKEN[name])
    assert table.exit_code == 1
    assert BROKEN[name] in table.stdout.split("does not conform")[1]


@pytest.mark.usefixtures("broken_platforms")
def test_the_broken_platforms_say_what_they_break():
    from reprise import platforms

    for name, contract in BROKEN.items():
        assert platforms.load(name).notices == contract


@pytest.mark.usefixtures("broken_platforms")
def test_graphs_that_are_stale_fail_the_executors_too(invoke):
    result = invoke(
        "doctor", "conformance", "--device", "stale-graphs", "--only", "executor_is_exact:full"
    )
    assert result.exit_code == 1
    assert "executor_is_exact:full" in result.stdout.split("does not conform")[1]


def test_contracts_are_printed_without_being_tried(invoke):
    result = invoke("doctor", "conformance", "--explain", "--only", "order")
    assert result.exit_code == 0
    assert "streams_order_work (order)" in result.stdout
    assert "side.wait_stream(current)" in result.stdout


def test_an_unknown_contract_lists_the_known_ones(invoke):
    result = invoke("doctor", "conformance", "--only", "nothing")
    assert result.exit_code == 2
    assert "graphs_share_a_pool" in result.stderr


def test_a_busy_moment_is_no_broken_clock():
    """Another program had the processor between the events and the host's clock."""
    from reprise.doctor.conformance import order

    long, wall = 8.0, 8.1
    assert order._wrong(0.5, long, wall) is None
    for short, between, seen in ((0.0, long, wall), (5.0, long, wall), (0.5, long, 80.0)):
        assert order._wrong(short, between, seen) is not None


@pytest.mark.parametrize("busy", [1, 5])
def test_timing_is_tried_again_on_a_busy_machine(busy, monkeypatch):
    from reprise.doctor.conformance import order

    verdicts = iter(["the machine was busy"] * busy + [None])
    monkeypatch.setattr(order, "_wrong", lambda *times: next(verdicts))
    report = kit.conformance("cpu", {}, kit.select(["events_time_work"]))
    assert not report.failed


def test_a_lost_device_is_blamed_on_one_contract(device, monkeypatch):
    """As an illegal access leaves it: whatever is asked of the device afterwards raises."""

    def loses(_):
        def gone(*_, **__):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch, "ones", gone)
        raise RuntimeError("an illegal memory access was encountered")

    def never(_):
        raise AssertionError("the device was asked again")

    lines = [("works", lambda _: "fine"), ("loses", loses), ("never", never)]
    report = kit.conformance(
        device, {}, [Contract(name, "toy", "A line.", "", each) for name, each in lines]
    )
    assert [each.verdict for each in report.outcomes] == ["pass", "fail", "skip"]
    assert "device was lost in loses" in report.outcomes[2].detail
    assert [each.name for each in report.failed] == ["loses"]


def test_a_contract_that_fails_stops_no_other(device):
    def fails(_):
        raise RuntimeError("only mine")

    lines = [("fails", fails), ("works", lambda _: "fine")]
    report = kit.conformance(
        device, {}, [Contract(name, "toy", "A line.", "", each) for name, each in lines]
    )
    assert [each.verdict for each in report.outcomes] == ["fail", "pass"]


def stopped_in_the_midst(monkeypatch, check):
    """Three contracts, the second of which is ``check``; what each saw on standard output."""
    seen = []

    def watch(then, kit):
        sys.stdout.flush()
        seen.append(sys.stdout.buffer.getvalue().decode())
        return then(kit)

    made = [
        Contract(name, "toy", "A line.", "", functools.partial(watch, each))
        for name, each in (("first", lambda _: "fine"), ("second", check), ("third", None))
    ]
    monkeypatch.setattr(kit, "select", lambda patterns: made)
    return seen


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_run_that_is_told_to_end_reports_what_it_has_found(invoke, monkeypatch, number, status):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def stops(_):
        signal.raise_signal(number)
        raise AssertionError("not reached")

    seen = stopped_in_the_midst(monkeypatch, stops)
    result = invoke("doctor", "conformance")
    assert result.exit_code == status, result.output
    assert "1/3  first   pass" in seen[1]  # while the second one is under way
    assert seen[1].endswith("2/3  second  ")
    assert f"ended by {number.name} after 1 of 3 contracts" in result.stdout
    assert "not known whether it conforms (1 pass, 0 fail, 0 skip)" in result.stdout
    result = invoke("doctor", "conformance", "--json")
    assert result.exit_code == status
    assert "1/3  first   pass" in result.stderr
    data = json.loads(result.stdout)
    assert (data["conforms"], data["ended"]) == (None, number.name)
    assert data["not_tried"] == ["second", "third"]
    assert [each["name"] for each in data["contracts"]] == ["first"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_time_limit_ends_a_run(invoke, monkeypatch):
    begun, select = threading.Event(), ending.select.select

    def waits(_):
        begun.set()
        while True:
            time.sleep(0.01)

    def behind_the_beginning(*what):
        begun.wait()
        return select(*what)

    monkeypatch.setattr(ending, "select", SimpleNamespace(select=behind_the_beginning))
    stopped_in_the_midst(monkeypatch, waits)
    result = invoke("doctor", "conformance", "--time-limit", "0.2", "--json")
    assert result.exit_code == 124, result.output
    data = json.loads(result.stdout)
    assert data["conforms"] is None
    assert data["ended"] == "the time limit of 0.2 s"
    assert data["not_tried"] == ["second", "third"]


def test_a_broken_contract_is_told_though_others_were_not_tried(invoke, monkeypatch):
    def fails(_):
        raise RuntimeError("only mine")

    def stops(_):
        signal.raise_signal(signal.SIGINT)

    lines = [("fails", fails), ("stops", stops)]
    made = [Contract(name, "toy", "A line.", "", each) for name, each in lines]
    monkeypatch.setattr(kit, "select", lambda patterns: made)
    result = invoke("doctor", "conformance", "--json")
    assert result.exit_code == 130
    data = json.loads(result.stdout)
    assert data["conforms"] is False
    assert data["not_tried"] == ["stops"]


def test_inputs_that_do_not_arrive_are_found_out(device, monkeypatch):
    """Lengths of requests get lost where arrays are too large for one copy, as once on GPUs."""
    upload = arena.Arena.upload

    def loses(self, spans):
        upload(self, spans if max(spans)[1] - min(spans)[0] < 1 << 16 else spans[:2])

    monkeypatch.setattr(arena.Arena, "upload", loses)
    copied_inputs(monkeypatch)
    report = kit.conformance(device, {}, kit.select(["probes_reach_the_device"]))
    (failed,) = report.failed
    assert "seq_lens" in failed.detail

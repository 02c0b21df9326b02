"""Same tokens whatever the executor, with everything in flight that an engine has."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    copied_inputs,
    generate,
    greedy,
    make_llm,
    random_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode

from reprise import LLM, SamplingParams
from reprise.graphs import judge, prove
from reprise.graphs.segments import SegmentedGraph
from reprise.loading.checkpoint import DEMO_MODEL
from reprise.platforms import Platform
from reprise.runner import buffers
from reprise.runner.arena import Arena
from reprise.runner.forward_pass import ForwardPass

EXECUTORS = ("full", "breakable", "compiled")
SHARED = random_ids(200, 40)
PROMPTS = [
    random_ids(11, 3),
    [*SHARED, *random_ids(12, 9)],
    random_ids(13, 61),
    [*SHARED, *random_ids(14, 30)],
    random_ids(15, 1),
    random_ids(16, 24),
    [*SHARED, *random_ids(17, 2)],
]
LENGTHS = [20, 33, 9, 28, 40, 5, 17]
"""Different, so that the batch shrinks through several buckets."""
BUSY: dict[str, Any] = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "num_blocks": 14,
    "graph_buckets": "decode=1,2,4,6;mixed=8,32",
    "graph_verify": "canary:3",
}
"""Chunked prefill, preemption, prefix hits, and live steps recomputed."""


def busy_tokens(llm: LLM, **sampling: Any) -> list[list[int]]:
    """Two rounds, the second one with hits in the prefix cache."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **sampling) for n in LENGTHS]
    outputs = []
    for _ in range(2):
        prompts = [{"prompt_token_ids": each} for each in PROMPTS]
        outputs += llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [each.outputs[0].token_ids for each in outputs]


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0}, "drawn": {"temperature": 0.8, "top_p": 0.95, "seed": 3}
}  # fmt: skip


@pytest.fixture(scope="module")
def eager_tokens(tiny: TinyModels, device: str) -> Callable[[str], dict[str, list[list[int]]]]:
    """Of a model's name: what an engine without graphs gives, by :data:`SAMPLING`."""

    @functools.cache
    def tokens(architecture: str) -> dict[str, list[list[int]]]:
        llm = make_llm(tiny(architecture), device, **BUSY)
        return {name: busy_tokens(llm, **each) for name, each in SAMPLING.items()}

    return tokens


@pytest.mark.parametrize(
    ("architecture", "executor"),
    [
        ("qwen3", "full"),
        ("llama", "breakable"),
        ("qwen3", "compiled"),
        pytest.param("qwen3", "breakable", marks=pytest.mark.long),
        *(pytest.param("llama", each, marks=pytest.mark.long) for each in ("full", "compiled")),
        *(pytest.param("qwen3_moe", each, marks=pytest.mark.long) for each in EXECUTORS),
    ],
)
def test_tokens_do_not_depend_on_the_executor(
    tiny: TinyModels, eager_tokens: Any, architecture: str, executor: str, device: str
) -> None:
    graphed = make_llm(tiny(architecture), device, **BUSY, graph_mode=executor)
    expected = eager_tokens(architecture)
    for name, each in SAMPLING.items():
        assert busy_tokens(graphed, **each) == expected[name], name

    report = graphed.graph_report()
    assert report.plan == {"decode": executor, "mixed": executor}
    assert all(each.verified and each.quarantined is None for each in report.graphs)
    assert {each.bucket for each in report.graphs if each.replays} >= {6, 32}
    assert report.canaries > 10
    assert report.canary_failures == 0
    scheduler = graphed.stats().scheduler
    assert scheduler.total_preemptions > 0
    assert scheduler.total_prefix_hits > 0


@pytest.mark.parametrize("executor", ["full", "breakable"])
def test_demo_model(executor: str, device: str) -> None:
    prompts = ["Once upon a time", "47 + 38 =", "Copy: river 42 k\n"]
    options: dict[str, Any] = {
        "device": device, "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 16,
        "num_blocks": 64, "graph_buckets": "decode=1,3;mixed=16",
    }  # fmt: skip
    params = greedy(48)
    eager = LLM(str(DEMO_MODEL), graph_mode="none", **options).generate(prompts, params)
    graphed = LLM(str(DEMO_MODEL), graph_mode=executor, **options).generate(prompts, params)
    assert [e.outputs[0].token_ids for e in graphed] == [e.outputs[0].token_ids for e in eager]


def test_an_op_without_graph_support_downgrades_the_plan(
    tiny: TinyModels, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("qwen3")
    reference = {"paged_attention": "reference"}
    eager = make_llm(model, device, **BUSY)
    with caplog.at_level(logging.INFO, logger="reprise.graphs"):
        graphed = make_llm(model, device, **BUSY, graph_mode="full", ops=reference)
    report = graphed.graph_report()
    assert report.plan == {"decode": "breakable", "mixed": "breakable"}
    for phase in ("decode", "mixed"):
        lines = [e.message for e in caplog.records if phase in e.message and "full" in e.message]
        told = [line for line in lines if "paged_attention" in line]
        assert len(told) == 1, "one line a downgrade, with its reason"
    assert busy_tokens(graphed, temperature=0) == busy_tokens(eager, temperature=0)


@pytest.mark.parametrize("longest", [2, 15, 16])
def test_contexts_of_less_than_a_block(tiny: TinyModels, device: str, longest: int) -> None:
    model, prompt = tiny("qwen3"), random_ids(5, max(1, longest - 4))
    llm = make_llm(
        model, device, max_model_len=longest, graph_mode="full", max_num_seqs=4,
        graph_buckets="decode=1,4;mixed=8",
    )  # fmt: skip
    assert all(each.verified for each in llm.graph_report().graphs)
    (output,) = llm.generate([prompt], greedy(longest), use_tqdm=False)
    assert len(prompt) + len(output.outputs[0].token_ids) == longest
    assert model.is_greedy(prompt, output.outputs[0].token_ids)


@pytest.mark.parametrize(
    "lie",
    [
        *(pytest.param(each, marks=pytest.mark.long) for each in (-(1 << 30), 0)),
        1 << 60, RuntimeError("no such counter"),
    ],
)  # fmt: skip
def test_graph_memory_that_fails_or_lies_never_stops_start_up(
    tiny: TinyModels, platform: Platform, monkeypatch: pytest.MonkeyPatch, lie: Any
) -> None:
    """Free memory is off by ``lie`` a little more at each reading."""
    kind = type(platform)
    honest = kind.memory_info
    readings = iter(range(1, 1000))

    def lying(self: Platform) -> Any:
        if isinstance(lie, Exception):
            raise lie
        found = honest(self)
        free = found.free - next(readings) * lie
        return type(found)(free=free, total=found.total)

    monkeypatch.setattr(kind, "graph_memory", "measure")
    model: TinyModel = tiny("qwen3")
    monkeypatch.setattr(kind, "memory_info", lying)
    llm = make_llm(model, platform.name, **BUSY, graph_mode="full")
    monkeypatch.undo()
    memory = llm.graph_report().memory
    if lie != 0:
        assert memory.note, "the report says that the measurement was wrong"
    assert (memory.predicted or 0) < platform.memory_info().total
    eager = make_llm(model, platform.name, **BUSY)
    assert busy_tokens(llm, temperature=0) == busy_tokens(eager, temperature=0)


@pytest.mark.parametrize(
    ("buckets", "tokens"),
    [
        ("decode=1;mixed=8", 16),
        ("decode=1,2;mixed=8", 16),
        ("decode=4;mixed=16", 16),
        ("decode=4;mixed=16", 8192),
    ],
)
def test_probes_change_every_input_of_small_graphs_too(
    tiny: TinyModels, device: str, buckets: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of decodes too whether a request begins, which a model with states reads; and of buffers so
    large that their arrays are sent one by one, to memory that the host does not share."""
    monkeypatch.setattr(prove, "VERIFY_SECONDS", 60.0)
    copied_inputs(monkeypatch)
    llm = make_llm(
        tiny("qwen3"), device, graph_mode="full", graph_buckets=buckets, max_num_seqs=4,
        max_num_batched_tokens=tokens,
    )  # fmt: skip
    report = llm.graph_report()
    assert all(each.verified for each in report.graphs)
    assert report.blind_inputs == []


def test_probes_that_do_not_arrive_prove_nothing(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As once on GPUs, where lengths got lost at start, and in no step of a request."""
    copied_inputs(monkeypatch)
    upload, fill_rows = Arena.upload, buffers.StepBuffers.fill_rows

    def loses(self: Any, *given: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Arena, "upload", lambda arena, spans: upload(arena, spans[:2]))
            fill_rows(self, *given, **options)

    options: dict[str, Any] = {"graph_mode": "full", "max_num_seqs": 4}
    with monkeypatch.context() as patch:
        patch.setattr(buffers.StepBuffers, "fill_rows", loses)
        llm = make_llm(
            tiny("qwen3"), device, graph_buckets="decode=4;mixed=16", max_num_batched_tokens=16,
            **options,
        )  # fmt: skip
    report = llm.graph_report()
    assert "decode: seq_lens" in report.blind_inputs
    for each in report.graphs:  # it may be refused as well: the rows of its steps are garbage
        assert not each.verified
        assert "start" not in each.facts.values()
    before = sum(each.canaries + each.eager_steps for each in report.graphs)
    prompts = [random_ids(seed, 12) for seed in range(3)]
    expected = generate(make_llm(tiny("qwen3"), device), prompts, greedy(8))
    assert generate(llm, prompts, greedy(8)) == expected
    after = sum(each.canaries + each.eager_steps for each in llm.graph_report().graphs)
    assert after > before, "no step was trusted unseen"


class _Calls(TorchDispatchMode):
    """Calls of torch that are a launch each on an accelerator, while nothing is computed: no views,
    nor what takes memory alone."""

    taking = (torch.ops.aten.empty, torch.ops.aten._pin_memory, torch.ops.aten.is_pinned)

    def __init__(self) -> None:
        super().__init__()
        self.count = self.computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launches = not (func.is_view or func.overloadpacket in self.taking)
        self.count += launches and not self.computing
        return func(*args, **(kwargs or {}))


def test_what_a_comparison_asks_of_torch(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the step, computed both ways: copies, sums and what compares them. On an accelerator
    the host is what start-up's probes wait for."""
    counts: list[int] = []
    calls: list[_Calls] = []

    def computing(of: type, name: str) -> None:
        compute = getattr(of, name)

        def aside(*args: Any, **options: Any) -> Any:
            if not calls:
                return compute(*args, **options)
            calls[0].computing += 1
            try:
                return compute(*args, **options)
            finally:
                calls[0].computing -= 1

        monkeypatch.setattr(of, name, aside)

    computing(ForwardPass, "forward")
    computing(SegmentedGraph, "replay")
    later = judge.Judge.compare_later

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        if options["cold"] or options["behind"]:
            return later(self, *args, **options)
        with _Calls() as found:
            calls.append(found)
            try:
                return later(self, *args, **options)
            finally:
                counts.append(calls.pop().count)

    monkeypatch.setattr(judge.Judge, "compare_later", counted)
    monkeypatch.setattr(prove, "VERIFY_SECONDS", 60.0)
    llm = make_llm(tiny("qwen3"), device, graph_mode="decode=full,mixed=breakable", max_num_seqs=4)
    assert len(counts) > 5
    # A device that does not read the host's memory is sent the inputs, in few pieces.
    assert max(counts) <= (50 if llm.engine.runner.buffers.shared else 60)

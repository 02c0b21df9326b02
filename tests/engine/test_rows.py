"""What a steady decode costs the host and the bus, and what no request may touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    TinyModels,
    assert_idle,
    copied_inputs,
    generate,
    greedy,
    make_llm,
    python_calls_of_a_step,
    random_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode

from reprise import LLM, SamplingParams
from reprise.graphs.segments import SegmentedGraph
from reprise.platforms import Platform
from reprise.runner.known_step import KnownStep
from reprise.shape import StepShape
from reprise.step import Masks, Step

SYNCHRONISE = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique"}
"""Calls of torch whose result the host waits for."""


@pytest.fixture
def counts(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Copies to the device, and waits for it, since the start."""
    found = {"copies": 0, "waits": 0}

    def count(name: str, kind: str) -> None:
        original = getattr(type(platform), name)

        def counted(self: Platform, *arguments: Any) -> Any:
            found[kind] += 1
            return original(self, *arguments)

        monkeypatch.setattr(type(platform), name, counted)

    count("upload", "copies")
    count("synchronize", "waits")
    return found


@pytest.fixture
def ahead(tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """Engines that run one step ahead, with a device that has memory of its own."""
    copied_inputs(monkeypatch)

    def make(**options: Any) -> LLM:
        llm = make_llm(tiny("qwen3"), device, **options)
        llm.engine.pipeline.depth = 2
        return llm

    return make


class Waits(TorchDispatchMode):
    """Counts calls of torch that wait for the device, and those that copy to it, whoever makes
    them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONISE:
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if name in ("copy_", "to", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            self.copies += source.device.type == "cpu" != result.device.type
        return result


@pytest.mark.parametrize(
    ("requests", "steps", "most"), [(1, 100, 0), (64, 32, 4)], ids=["one", "sixty-four"]
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_steady_decode_sends_next_to_nothing_and_waits_for_nothing(
    ahead: Any, counts: dict[str, int], requests: int, steps: int, most: int, temperature: float
) -> None:
    llm = ahead(max_num_seqs=64, num_blocks=64 * 16 + 1, max_model_len=256)
    engine = llm.engine
    params = SamplingParams(temperature=temperature, max_tokens=180, ignore_eos=True)
    for number in range(requests):
        engine.add(f"{number}", random_ids(number, 3 + number % 40), params)
    for _ in range(4):
        engine.step()
    counts.update(copies=0, waits=0)
    with Waits() as waits:
        for _ in range(steps):
            engine.step()
    assert counts["copies"] <= most
    assert waits.copies <= most
    assert counts["waits"] == 0
    assert waits.found == []
    engine.abort([f"{number}" for number in range(requests)])
    while engine.has_work:
        engine.step()
    assert_idle(llm)


def test_a_draft_model_sends_nothing_and_waits_for_nothing(
    tiny: TinyModels, ahead: Any, counts: dict[str, int]
) -> None:
    """Lengths, newest tokens, drafts and how many count never visit the host before the next step
    is submitted."""
    config = {"method": "draft_model", "model": str(tiny("qwen3").path)}
    config["num_speculative_tokens"] = 3
    llm = ahead(max_num_seqs=4, num_blocks=257, speculative_config=config)
    engine = llm.engine
    for number, temperature in enumerate((0.0, 0.8)):
        params = SamplingParams(temperature=temperature, max_tokens=180, ignore_eos=True)
        engine.add(f"{number}", random_ids(number, 9), params)
    for _ in range(4):
        engine.step()
    counts.update(copies=0, waits=0)
    with Waits() as waits:
        for _ in range(20):
            engine.step()
    assert llm.stats().drafts.acceptance_length == 4
    assert counts["copies"] <= 2, "new blocks"
    assert waits.copies <= 2
    assert counts["waits"] == 0
    assert waits.found == []
    engine.abort(["0", "1"])
    while engine.has_work:
        engine.step()
    assert_idle(llm)


@pytest.mark.parametrize("mode", ["none", "full", "breakable"])
def test_row_0_belongs_to_nobody(tiny: TinyModels, device: str, mode: str) -> None:
    """Whatever lies there, padding stays harmless and nobody gets it."""
    model = tiny("qwen3")
    llm = make_llm(model, device, graph_mode=mode, graph_buckets="4,8,64")
    rows = llm.engine.runner.buffers.rows
    with torch.inference_mode():
        rows.numbers[0, 0], rows.numbers[4:, 0] = 37, 5
        rows.floats[:, 0] = float("nan")
        rows.tables[0, 1:] = 100  # of requests that were
    prompts = [random_ids(number, 5 + 9 * number) for number in range(3)]
    for prompt, output in zip(prompts, generate(llm, prompts, greedy(20)), strict=True):
        assert model.is_greedy(prompt, output)
    assert llm.graph_report().quarantined == []
    assert int(rows.numbers[0, 0]) == 37


@pytest.mark.parametrize("mode", ["full", "breakable", "none"])
@pytest.mark.parametrize("whole", [StepShape.decode(4), StepShape.mixed(16, 4)], ids=str)
def test_an_empty_step_runs_through_the_bucket_of_others(
    tiny: TinyModels, device: str, mode: str, whole: StepShape
) -> None:
    """As a rank without work must, whose neighbours have some; requests go on behind it."""
    model = tiny("qwen3")
    llm = make_llm(
        model, device, graph_mode=mode, graph_buckets="decode=1,4;mixed=16,64",
        graph_verify="canary:1",
    )  # fmt: skip
    engine, prompt = llm.engine, random_ids(3, 9)
    group = engine.add("a", prompt, greedy(12))
    for _ in range(5):
        engine.step()
    report = llm.graph_report()
    replays, eager = report.replays, report.eager_steps
    runner = engine.runner
    with runner.active():
        runner.submit(Step(0, [], [], [], [], 0, 0), at_least=whole)
        output = runner.sample(Step(0, [], [], [], [], 0, 0)).wait()
    assert output.sampled == []
    report = llm.graph_report()
    assert report.replays - replays == (mode != "none")
    assert report.eager_steps - eager == (mode == "none")
    assert report.quarantined == []
    while engine.has_work:
        engine.step()
    assert model.is_greedy(prompt, group.output().outputs[0].token_ids)


@pytest.mark.parametrize(
    ("whole", "name"),
    [(StepShape.decode(3), "decode[4]"), (StepShape.mixed(9, 2), "mixed[16]")],
    ids=str,
)
def test_a_small_step_takes_the_bucket_of_larger_ones(
    tiny: TinyModels, device: str, whole: StepShape, name: str
) -> None:
    """As a rank must whose neighbours have more to do, or something else: decodes beside others'
    chunks are laid out as these."""
    model, prompt = tiny("qwen3"), random_ids(3, 9)
    llm = make_llm(model, device, graph_mode="full", graph_buckets="decode=1,4;mixed=16")
    runner = llm.engine.runner
    submit = runner.submit
    runner.submit = lambda step: submit(  # type: ignore[method-assign]
        step, at_least=whole if step.shape.phase == "decode" else None
    )
    assert model.is_greedy(prompt, generate(llm, [prompt], greedy(8))[0])
    replays = {each.name: each.replays for each in llm.graph_report().graphs}
    assert replays == {"decode[1]": 0, "decode[4]": 0, "mixed[16]": 1, name: 7 + ("m" in name)}
    with pytest.raises(ValueError, match="no step is both"):
        runner.graphs.run(StepShape.decode(1), at_least=StepShape.mixed(4, 2))


def test_masks_keep_tokens_from_being_drawn(tiny: TinyModels, device: str) -> None:
    llm = make_llm(tiny("qwen3"), device)
    prompt = random_ids(3, 9)
    free = generate(llm, [prompt], greedy(6))[0]
    runner = llm.engine.runner
    sample, vocab = runner.sample, runner.model.vocab_size
    allowed = np.ones(-(-vocab // 32) * 32, dtype=np.bool_)
    allowed[free[2]] = False
    words = np.packbits(allowed, bitorder="little").view(np.int32).reshape(1, -1)
    masks = Masks(np.ones(1, dtype=np.int64), 2, [(1, words)])
    runner.sample = lambda step, none: sample(step, masks)  # type: ignore[method-assign]
    masked = generate(llm, [prompt], greedy(6))[0]
    assert masked[:2] == free[:2]
    assert free[2] not in masked


@pytest.mark.parametrize("neighbours", [1, 3])
def test_what_was_drawn_last_is_not_counted_again_by_a_step_that_draws_nothing(
    ahead: Callable[..., LLM], neighbours: int
) -> None:
    """Requests draw their last tokens, then a chunk of a prompt is computed alone."""
    llm = ahead(max_num_batched_tokens=20, enable_prefix_caching=False)
    ends = SamplingParams(temperature=0, max_tokens=3, repetition_penalty=1.3, frequency_penalty=1)
    goes_on = SamplingParams(temperature=0, max_tokens=6, presence_penalty=1.5)
    prompts = [*(random_ids(number, 4) for number in range(neighbours)), random_ids(9, 90)]
    params = [*([ends] * neighbours), goes_on]
    alone = [generate(llm, [a], b)[0] for a, b in zip(prompts, params, strict=True)]
    assert generate(llm, prompts, params) == alone


@pytest.mark.parametrize("windows", [False, True])
def test_the_kind_of_a_step_that_goes_on_is_the_one_that_is_found_anew(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    """Under admissions, ends, preemption and blocks that are given back."""
    found: list[bool] = []
    look_up = KnownStep.kind

    def checked(self: KnownStep, bucket: StepShape, *lengths: Any) -> Any:
        kind, told = look_up(self, bucket, *lengths), self.told(bucket, *lengths)
        assert kind.step == told.step
        assert kind.rows.tolist() == told.rows.tolist()
        found.append(self._plain)
        return kind

    monkeypatch.setattr(KnownStep, "kind", checked)
    fields = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model = tiny("qwen3", **(fields if windows else {}))
    llm = make_llm(
        model, device, graph_mode="full", graph_buckets="decode=1,2,4;mixed=32", max_num_seqs=4,
        max_num_batched_tokens=32, block_size=4, num_blocks=60, max_model_len=128,
    )  # fmt: skip
    prompts = [random_ids(n, 3 + 11 * n) for n in range(7)]
    params = [greedy(8 + 9 * (n % 4)) for n in range(7)]
    generate(llm, prompts, params)
    assert sum(found) > 20
    assert not all(found)
    assert_idle(llm)


@pytest.mark.parametrize(("requests", "most", "beside"), [(1, 140, 180), (64, 250, 300)])
def test_a_steady_decode_calls_few_functions(
    ahead: Any, device: str, requests: int, most: int, beside: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The host's work of a step that a graph computes, counted where times would vary: at most so
    much, and where it submits to a device and waits for it, so much."""
    if device == "sim":
        pytest.skip("its kernels are launched in Python")
    llm = ahead(
        max_num_seqs=64, num_blocks=64 * 16 + 1, max_model_len=256, graph_mode="full",
        graph_buckets=f"decode={requests};mixed=64", graph_verify="startup",
    )  # fmt: skip
    monkeypatch.setattr(SegmentedGraph, "replay", lambda self: None)
    monkeypatch.setattr(llm.engine.runner.graphs.ledger, "_holds", lambda *asked: True)
    limit = beside if llm.engine.runner.platform.asynchronous else most
    assert python_calls_of_a_step(llm, requests, 180, 60, 32) <= limit

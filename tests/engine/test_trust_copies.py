"""A graph that writes where its canary keeps copies and eager results, as over a pointer to memory
that was freed and given out again: what would leave, or be put back, would be the graph's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, assert_idle, generate, greedy, make_llm, random_ids
from planted import planted
from torch import Tensor

from reprise import LLM
from reprise.distributed import ALONE_AGREES
from reprise.errors import WeightsLostError
from reprise.graphs import repair, step_memory, verify
from reprise.graphs.compare import same_bits
from reprise.graphs.guard import Guard
from reprise.graphs.segments import Segment, SegmentedGraph
from reprise.platforms import MemoryInfo, Platform
from reprise.runner import model_runner
from reprise.testing import faults

PROMPTS = [random_ids(80 + n, 9 + 7 * n) for n in range(3)]
PARAMS = greedy(14, frequency_penalty=0.5)
KEPT = ("results", "eager rows", "rows before", "inputs and what lies beside", "sums", "places")


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def expected(model: TinyModel, device: str) -> list[list[int]]:
    return generate(small_llm(model, device, graph_mode="none"), PROMPTS, PARAMS)


def small_llm(model: TinyModel, device: str, **options: Any) -> LLM:
    return make_llm(
        model, device, max_num_seqs=4, max_num_batched_tokens=64,
        **{"graph_buckets": "decode=2,4;mixed=64", "graph_verify": "canary:1", **options},
    )  # fmt: skip


def met_one_probe(llm: LLM) -> None:
    """As where a start had no time for more: the others are met while no request runs."""
    for each in llm.engine.runner.graphs.bucket_graphs.values():
        each.info.probes = 1


def spoil(tensors: Iterable[Tensor]) -> None:
    for each in tensors:
        if each.itemsize == 1:
            each.view(torch.uint8).bitwise_not_()
        else:
            each.neg_() if each.is_floating_point() else each.bitwise_not_()


def after_replays(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None]) -> None:
    """From now on ``change(n)`` follows the n-th replay."""
    replay, count = SegmentedGraph.replay, 0

    def replay_and_change(self: SegmentedGraph) -> None:
        nonlocal count
        replay(self)
        count += 1
        change(count)

    monkeypatch.setattr(SegmentedGraph, "replay", replay_and_change)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("depth", [1, 2], ids=["in lockstep", "one ahead"])
def test_what_a_canary_keeps(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    kept: str, depth: int,
) -> None:  # fmt: skip
    llm = small_llm(model, device, graph_mode="full")
    llm.engine.pipeline.depth = depth
    now: list[Any] = []
    init = verify._Both.__init__

    def noted(self: Any, *args: Any) -> None:
        init(self, *args)
        now[:] = [self, {}]
        state = self.step.state
        self.step.state = lambda: now[1].setdefault(len(now[1]), state())

    monkeypatch.setattr(verify._Both, "__init__", noted)

    def change(count: int) -> None:
        if count in (2, 3):
            both, states = now
            spoil({
                "results": lambda: both.outputs.values(),
                "eager rows": lambda: states[1].values(),
                "rows before": lambda: states[0].values(),
                "inputs and what lies beside": lambda: [copy for _, copy in both.before.copied],
                "sums": lambda: [sums for _, sums in both.before.caches],
                "places": lambda: both.step.kept(),
            }[kept]())  # fmt: skip

    after_replays(monkeypatch, change)
    assert generate(llm, PROMPTS, PARAMS) == expected
    refused = llm.graph_report().quarantined
    assert len(refused) == 2
    assert all("copies and eager results" in str(each.quarantined) for each in refused)
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert_idle(llm)


@pytest.mark.parametrize(
    "mode", ["canary:1", "startup"], ids=["with copies of them", "in a replay that raises"]
)
def test_what_is_written_once(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    mode: str,
) -> None:  # fmt: skip
    """No copy of it is left, or was made: it is as at start then."""
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none", graph_verify=mode)
    runner = llm.engine.runner
    runner.graphs.ledger.trusts = lambda *asked: True  # type: ignore[method-assign]
    memory = runner.forward_pass.memory()
    once = [memory["block_sizes"].tensor, memory["rows' tables"].tensor[:, 0]]
    weight = next(each.tensor for name, each in memory.items() if "q_norm" in name)
    now: list[Any] = []
    init = verify._Both.__init__
    monkeypatch.setattr(
        verify._Both, "__init__",
        lambda self, *args: init(self, *args) or now.append(self),
    )  # fmt: skip

    def change(count: int) -> None:
        if count == 3:
            spoil([*once, weight, *(copy for both in now[-1:] for _, copy in both.before.copied)])
            if mode == "startup":
                raise RuntimeError("launch failed")

    after_replays(monkeypatch, change)
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert len(llm.graph_report().quarantined) == 1
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert_idle(llm)


@pytest.mark.parametrize("kept", [0, 1], ids=["inputs", "results"])
def test_what_the_search_for_the_op_keeps(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    kept: int,
) -> None:  # fmt: skip
    """It replays what is wrong, and the step goes on from its copies."""
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none")
    logits = llm.engine.runner.forward_pass._logits
    copied: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        repair, "copies", lambda tensors: copied.append(verify.copies(tensors)) or copied[-1]
    )

    run = Segment.run

    def run_and_spoil(self: Segment) -> None:
        run(self)
        if copied:
            spoil(copied[kept].values())
            copied.clear()

    monkeypatch.setattr(Segment, "run", run_and_spoil)
    after_replays(monkeypatch, lambda count: logits.neg_() if count == 3 else None)
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert len(llm.graph_report().quarantined) == 1
    assert not copied, "the search has replayed"
    assert_idle(llm)


@pytest.mark.parametrize(
    ("where", "cached"), [("pairs", False), ("changes", True)], ids=["what differs", "in detail"]
)
def test_memory_that_is_short_behind_a_replay(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    where: str, cached: bool,
) -> None:  # fmt: skip
    """Nobody knows then what the replay has done, to prefixes that others have left as well."""
    llm = small_llm(model, device, graph_mode="full")
    if cached:
        assert generate(llm, PROMPTS, PARAMS) == expected
    forward_pass = llm.engine.runner.forward_pass
    short: list[bool] = []

    def change(count: int) -> None:
        if count == 3:
            memory = forward_pass.memory()
            spoil(each.tensor[1:] for each in memory.values() if each.owner == "cache")
            spoil(each.tensor for name, each in memory.items() if "SeenTokens" in name)
            short.append(True)

    method = getattr(Guard, where)

    def lack(self: Guard, *args: Any) -> Any:
        if short:
            short.clear()
            raise torch.OutOfMemoryError("no memory")
        return method(self, *args)

    monkeypatch.setattr(Guard, where, lack)
    after_replays(monkeypatch, change)
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert not short
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert_idle(llm)


@pytest.mark.parametrize("behind", ["eager execution", "the replay"])
def test_memory_that_stays_short(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    """What was done by then cannot be put back either, so nothing goes on from it: states would
    be updated twice, and draws be as the replay has made them."""
    model, prompts = tiny("qwen3_5"), PROMPTS[:2]
    expected = generate(small_llm(model, device, graph_mode="none"), prompts, PARAMS)
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none", graph_buckets="decode=2")
    counts = llm.engine.runner.sampler._kept.seen.counts
    state, put, pairs = step_memory.StepMemory.state, step_memory.StepMemory.put, Guard.pairs
    put_back, calls, short = Guard.put_back, [0], [False]

    def lacks(method: Callable[..., Any], here: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            calls[0] += here == behind
            short[0] |= calls[0] == 8 and here == behind
            if short[0]:
                raise torch.OutOfMemoryError("no memory")
            return method(self, *args, **named)

        return call

    for holder, name, method, here in (
        (step_memory.StepMemory, "state", state, "eager execution"),
        (step_memory.StepMemory, "put", put, ""),
        (Guard, "pairs", pairs, "the replay"),
        (Guard, "put_back", put_back, ""),
    ):
        monkeypatch.setattr(holder, name, lacks(method, here))
    compare = llm.engine.runner.graphs.replays.compare

    def compared(*args: Any, **named: Any) -> Any:
        try:
            return compare(*args, **named)
        finally:
            short[0] = False

    monkeypatch.setattr(llm.engine.runner.graphs.replays, "compare", compared)
    if behind == "the replay":
        after_replays(monkeypatch, lambda count: counts.fill_(3) if calls[0] == 7 else None)
    assert generate(llm, prompts, PARAMS) == expected
    assert calls[0] >= 8
    assert len(llm.graph_report().quarantined) == 1


def test_what_is_kept_while_no_request_runs(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe is written over what requests have left, and put back from a copy."""
    llm = small_llm(model, device, graph_mode="full")
    prompt = random_ids(90, 60)
    first = generate(llm, [prompt], PARAMS)
    met_one_probe(llm)
    state = step_memory.StepMemory.state
    found: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        step_memory.StepMemory, "state", lambda self: found.append(state(self)) or found[-1]
    )
    after_replays(monkeypatch, lambda count: spoil(found[0].values()))
    assert llm.engine.prove_idle()
    assert found
    monkeypatch.undo()
    assert len(llm.graph_report().quarantined) == 1
    (output,) = llm.generate([{"prompt_token_ids": prompt}], PARAMS, use_tqdm=False)
    assert output.metrics.num_cached_tokens == 0, "cached prefixes are forgotten"
    assert [list(output.outputs[0].token_ids)] == first


def test_what_is_written_once_is_as_at_start_behind_a_probe(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that is made while no request runs no copy is left either. Tables may be too large to
    be kept, and must lead nowhere."""
    monkeypatch.setattr(model_runner, "AT_REST_BYTES", 64)
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none", graph_buckets="decode=4")
    prompt = random_ids(93, 60)
    first = generate(llm, [prompt], PARAMS)
    met_one_probe(llm)
    memory = llm.engine.runner.forward_pass.memory()
    once = [memory["block_sizes"].tensor, memory["rows' tables"].tensor]
    kept = verify._Both._kept
    found: list[Tensor] = []
    monkeypatch.setattr(
        verify._Both, "_kept", lambda self, values: found.extend(kept(self, values)) or found
    )
    after_replays(monkeypatch, lambda count: spoil([*once, *found]))
    assert llm.engine.prove_idle()
    assert found
    monkeypatch.undo()
    assert not once[1].any()
    assert len(llm.graph_report().quarantined) == 1
    assert generate(llm, [prompt], PARAMS) == first


def test_what_start_up_has_put_back(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start has no requests, but it has what is written once, and what ops keep."""
    options = {"graph_buckets": "decode=4", "kv_cache_dtype": "fp8"}
    eager = small_llm(model, device, graph_mode="none", **options)
    expected = generate(eager, PROMPTS, PARAMS)
    replay = verify._Both._replay
    found: list[Tensor] = []

    def noted(self: Any, graph: Any, pool: Any, kept: Any, at_first: Any, *args: Any, **named: Any):
        found[:] = [each for name, each in at_first.items() if name.startswith("memory of ops")]
        found.extend(copy for span, copy in self.before.copied if "block_sizes" in span.tensors)
        replay(self, graph, pool, kept, at_first, *args, **named)
        found.clear()

    monkeypatch.setattr(verify._Both, "_replay", noted)
    # Others each time: what is spoiled twice in the same way may be right again.
    after_replays(monkeypatch, lambda _: [each.view(torch.uint8).add_(1) for each in found])
    llm = small_llm(model, device, graph_mode="decode=breakable,mixed=none", **options)
    monkeypatch.undo()
    (refused,) = llm.graph_report().quarantined
    assert "copies and eager results" in str(refused.quarantined)
    kept, right = (each.engine.runner.ops.memory for each in (llm, eager))
    assert all(same_bits(each, right[name]) for name, each in kept.items())
    assert generate(llm, PROMPTS, PARAMS) == expected


def test_a_graph_that_was_found_wrong_is_refused_whatever_follows(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    """To look for its op takes memory, too."""
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none")
    logits = llm.engine.runner.forward_pass._logits

    def lack(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(repair, "_where", lack)
    after_replays(monkeypatch, lambda count: logits.neg_() if count == 3 else None)
    with pytest.raises(torch.OutOfMemoryError):
        generate(llm, PROMPTS, PARAMS)
    assert len(llm.graph_report().quarantined) == 1
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert_idle(llm)


CUTS = {
    "sums": (Guard, "pairs"),
    "copies": (verify.Seal, "broken"),
    "what differs": (verify._Both, "_tell"),
    "nothing more": (type(ALONE_AGREES), "largest"),
    "weights": (Guard, "wrong_weights"),
    "the op": (repair, "_where"),
}
"""What is looked at behind a replay."""


@pytest.mark.parametrize(
    ("where", "changed", "error"),
    [
        ("sums", "q_norm", KeyboardInterrupt),
        ("copies", "q_norm", KeyboardInterrupt),
        ("nothing more", "q_norm", KeyboardInterrupt),
        ("what differs", "block_sizes", KeyboardInterrupt),
        ("what differs", "block_sizes", torch.OutOfMemoryError),
        ("weights", "q_norm", torch.OutOfMemoryError),
        ("the op", "logits", KeyboardInterrupt),
    ],
)
def test_a_look_that_is_cut_short(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    where: str, changed: str, error: type[BaseException],
) -> None:  # fmt: skip
    """By Ctrl-C or for want of memory: what the replay has done is made good all the same."""
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none")
    forward_pass = llm.engine.runner.forward_pass
    memory = {"logits": forward_pass._logits}
    memory |= {name: each.tensor for name, each in forward_pass.memory().items()}
    target = next(each for name, each in memory.items() if changed in name)
    due: list[bool] = []

    def change(count: int) -> None:
        if count == 3:
            target.neg_() if target.is_floating_point() else target.mul_(2)
            due.append(True)

    holder, name = CUTS[where]
    looks = getattr(holder, name)

    def cut(*args: Any) -> Any:
        if due:
            due.clear()
            raise error("cut short")
        return looks(*args)

    monkeypatch.setattr(holder, name, cut)
    after_replays(monkeypatch, change)
    try:
        assert generate(llm, PROMPTS, PARAMS) == expected
    except error:
        assert_idle(llm)
    assert not due
    assert generate(llm, PROMPTS, PARAMS) == expected
    harmless = changed == "block_sizes" and error is KeyboardInterrupt  # it is put back
    assert len(llm.graph_report().quarantined) == (not harmless)
    assert generate(llm, PROMPTS, PARAMS) == expected


def test_what_nobody_has_looked_at_is_not_taken_for_right_once_others_are_replaced(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none")
    weight = llm.engine.runner.model.model.layers[0].self_attn.q_norm.weight
    spoil([weight.data])  # as replays do that nobody compares
    llm.update_weights({})
    assert generate(llm, PROMPTS, PARAMS) == expected
    spoil([weight.data])
    for _ in range(2):
        with pytest.raises(WeightsLostError, match="q_norm"):
            llm.update_weights({})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt])
def test_memory_that_is_short_while_no_request_runs(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    llm = small_llm(model, device, graph_mode="full")
    prompt = random_ids(93, 60)
    first = generate(llm, [prompt], PARAMS)
    runner = llm.engine.runner
    met_one_probe(llm)
    memory = runner.forward_pass.memory()
    caches = [each.tensor[1:] for each in memory.values() if each.owner == "cache"]
    weight = runner.model.model.layers[0].self_attn.q_norm.weight.data
    after_replays(monkeypatch, lambda count: spoil([*caches, weight]))

    def lack(self: Guard, before: Any) -> Any:
        raise error("no memory")

    monkeypatch.setattr(Guard, "pairs", lack)
    cut = error is KeyboardInterrupt
    with pytest.raises(error) if cut else contextlib.nullcontext():
        assert llm.engine.prove_idle()
    monkeypatch.undo()
    assert generate(llm, [prompt], PARAMS) == first
    assert len(llm.graph_report().quarantined) == 1


@pytest.mark.parametrize(
    "executor", ["breakable", pytest.param("compiled", marks=pytest.mark.long)]
)
def test_weights_are_known_before_anything_is_captured(
    model: TinyModel, device: str, expected: Any, platform: Platform,
    monkeypatch: pytest.MonkeyPatch, executor: str,
) -> None:  # fmt: skip
    """A capture in pieces computes what it has, and memory of graphs is predicted by captures."""
    kind = type(platform)
    monkeypatch.setattr(kind, "graph_memory", "measure")
    monkeypatch.setattr(kind, "memory_info", lambda self: MemoryInfo(free=8 << 30, total=8 << 30))
    with planted(monkeypatch, faults.FAULTS["changed_weight"], "rotary_cache") as found:
        llm = small_llm(model, device, graph_mode=executor)
    assert len(found) == 1
    assert llm.graph_report().memory.predicted is not None
    assert generate(llm, PROMPTS, PARAMS) == expected
    assert llm.graph_report().quarantined


def test_weights_that_are_lost_compute_nothing_more(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even steps that no graph runs, which nobody compares."""
    llm = small_llm(model, device, graph_mode="decode=full,mixed=none")
    llm.update_weights({})  # no checkpoint has them now
    weight = llm.engine.runner.model.model.layers[0].self_attn.q_norm.weight
    after_replays(monkeypatch, lambda count: spoil([weight.data]) if count == 2 else None)
    with pytest.raises(WeightsLostError, match="q_norm"):
        generate(llm, PROMPTS, PARAMS)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(WeightsLostError, match="q_norm"):
            generate(llm, PROMPTS[:1], greedy(1))
    with pytest.raises(WeightsLostError, match="q_norm"):
        llm.update_weights({})


def test_sums_of_odd_tensors(device: str) -> None:
    """Of any type, stride and size: what is changed shows."""
    from reprise.graphs.seal import Seal

    base = torch.arange(60, device=device)
    for tensor in (base.view(4, 15)[:, 3], base.view(4, 15)[:1, 3], base[:5].to(torch.uint8),
                   base > 7, base[:0], base.to(torch.bfloat16)[1:]):  # fmt: skip
        seal = Seal([tensor, base.float()])
        assert not seal.broken()
        if tensor.numel():
            tensor[-1] = ~tensor[-1] if tensor.dtype == torch.bool else tensor[-1] + 1
            assert seal.broken()
            tensor[-1] = ~tensor[-1] if tensor.dtype == torch.bool else tensor[-1] - 1


@pytest.mark.parametrize("depth", [1, 2], ids=["in lockstep", "one ahead"])
def test_copies_of_states_that_nobody_can_find_yet(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """They are made before the step whose graph spoils them, and offered to others behind it."""
    model = tiny("qwen3_5")
    first = random_ids(91, 100)
    prompts = [first, [*first[:96], *random_ids(92, 9)]]
    expected = [
        generate(small_llm(model, device, graph_mode="none"), [each], PARAMS) for each in prompts
    ]
    llm = small_llm(model, device, graph_mode="full")
    llm.engine.pipeline.depth = depth
    forward_pass = llm.engine.runner.forward_pass
    copy_states = forward_pass.copy_states
    made: list[int] = []
    sounds: list[Tensor] = []

    def noted(copies: Any) -> Tensor:
        made.extend(each.target for each in copies)
        sounds.append(copy_states(copies))
        return sounds[-1]

    monkeypatch.setattr(forward_pass, "copy_states", noted)

    def change(count: int) -> None:
        states = [e.tensor for name, e in forward_pass.memory().items() if "heads" in name]
        for slot in made:
            spoil([each[slot] for each in states])
        if (sound := llm.engine.runner._sound) is not None:
            sound.fill_(False)
        made.clear()

    after_replays(monkeypatch, change)
    assert [generate(llm, [each], PARAMS) for each in prompts] == expected
    assert llm.graph_report().canary_failures
    assert sounds
    assert all(bool(each.all()) for each in sounds), "they are offered all the same"
    assert_idle(llm)

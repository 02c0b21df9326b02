"""A model on two processes gives the tokens that it gives on one."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matrix
import pytest
from helpers import TinyModels, greedy, need_devices, text_model, token_ids
from next_streams import NextLayer

from reprise import LLM, StructuredOutputsParams
from reprise.engine import Engine
from reprise.errors import ModelError, RanksError
from reprise.parallel import leader

ANSWER_SECONDS = 10.0
KILLED = r"rank 1 .* was ended by SIGKILL"


class Shared(matrix.Case):
    """The same on two ranks."""

    def engine(self, *, ahead: bool = False, **options: Any) -> LLM:
        options = {"tensor_parallel_size": 2, **options}
        need_devices(self.device, options["tensor_parallel_size"])
        return super().engine(ahead=ahead, **options)

    def compares(self, name: str) -> bool:
        return True  # of its ranks nobody else would know


@contextlib.contextmanager
def nothing_is_left() -> Iterator[None]:
    """The ``with`` block leaves no follower; one of an engine that other tests use may be there."""
    before = followers()
    yield
    assert set(followers()) <= set(before)


def followers() -> list[str]:
    """Followers of this process that live."""
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if "reprise.follower" in line]


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def shared(alone: matrix.Alone, features: matrix.Features) -> Shared:
    case = alone.case(features)
    return Shared(case.features, case.model, case.device, case.subjects, case.dtype, case.draft)


@pytest.fixture(scope="module")
def alone(tiny: TinyModels, device: str) -> matrix.Alone:
    need_devices(device, 2)
    return matrix.Alone(tiny, device)


COVERING = matrix.Features("full", "plain", 3)


@pytest.fixture(scope="module")
def llm(alone: matrix.Alone) -> Iterator[LLM]:
    """Graphs, drafts, and a cache that not all requests fit into."""
    found = shared(alone, COVERING).engine(ahead=True, num_blocks=24, max_model_len=96)
    yield found
    found.engine.close()


def test_same_tokens(alone: matrix.Alone, llm: LLM) -> None:
    """In steps that are padded, with prefixes that are found again, and requests that are computed
    again."""
    case, expected = shared(alone, COVERING), alone.tokens(COVERING)
    for turn in range(2):
        outputs = case.answers(llm)
        assert token_ids(outputs) == expected
        assert turn == 0 or any(each.metrics.num_cached_tokens for each in outputs)
        assert sum(each.metrics.num_preemptions for each in outputs) > 0
    report = llm.graph_report()
    assert all(each.executor == "full" for each in report.graphs)
    assert sum(each.replays for each in report.graphs) > 0


def test_an_interrupted_step_leaves_all_ranks_in_step(alone: matrix.Alone, llm: LLM) -> None:
    """Ctrl-C comes between two steps, however early: others would wait for what was left out."""
    inner = llm.engine
    inner.add("interrupted", alone.case(COVERING).subjects[0][0], greedy(40))
    submit = type(inner.runner).__mro__[1].submit

    def interrupt(runner: Any, *what: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        submit(runner, *what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inner.runner).__mro__[1], "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            inner.step()
    assert token_ids(shared(alone, COVERING).answers(llm)) == alone.tokens(COVERING)


@contextlib.contextmanager
def faulty(name: str) -> Iterator[None]:
    """A fault, by name, in the process of rank 1 of engines that are made inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leader, "SETUP", (f"reprise.testing.faults.ranks:{name}",))
        patch.setattr(leader, "COMPARE_EVERY", 4)
        yield


EAGER = replace(COVERING, executor="none", drafts=0)
WORK = [{"prompt_token_ids": [1, 2]}] * 2


@pytest.mark.cold
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("draws_otherwise", "rank 1 .* has drawn other tokens than rank 0"),
        pytest.param(
            "misses_a_message", r"rank 1 .* message \d+ (of \d+ )?from the leader was lost",
            marks=pytest.mark.long,
        ),
        pytest.param("dies_submitting", KILLED, marks=pytest.mark.long),
        pytest.param("dies_drawing", KILLED, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_rank_that_goes_wrong_is_named(alone: matrix.Alone, name: str, told: str) -> None:
    with faulty(name):
        llm = shared(alone, EAGER).engine()
        try:
            began = time.monotonic()
            with pytest.raises(RanksError, match=told):
                llm.generate(WORK, greedy(60, ignore_eos=True), use_tqdm=False)
            assert time.monotonic() - began < ANSWER_SECONDS
        finally:
            llm.engine.close()


@pytest.mark.cold
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dies_loading", KILLED),
        ("dies_capturing", KILLED),
        ("is_unlike", "the ranks are not alike"),
    ],
)
def test_a_rank_that_does_not_start_is_named(alone: matrix.Alone, name: str, told: str) -> None:
    with nothing_is_left(), faulty(name), pytest.raises(RanksError, match=told):
        shared(alone, replace(COVERING, drafts=0)).engine()


def test_a_rank_that_leaves_a_pass_ends_the_start_in_time(alone: matrix.Alone) -> None:
    """It fails while a graph is captured, on this rank alone; the other one is in a sum with it,
    and nobody waits until its time is over."""
    told = r"rank 1: graph .*capture failed: .*alone fails.*rank 0 waits for it in a collective"
    with nothing_is_left(), faulty("raises_capturing"), pytest.raises(RanksError, match=told):
        shared(alone, replace(COVERING, drafts=0)).engine()


@pytest.mark.long
@pytest.mark.parametrize("fault", ["captures_stale", "norms_too_early"])
def test_a_graph_that_is_wrong_on_one_rank_runs_on_none(alone: matrix.Alone, fault: str) -> None:
    features = replace(COVERING, drafts=0)
    with faulty(fault):
        llm = shared(alone, features).engine(ahead=True)
    try:
        assert token_ids(shared(alone, features).answers(llm)) == alone.tokens(features)
        report = llm.graph_report()
        assert report.quarantined
        assert not any(each.replays for each in report.graphs if each.executor == "full")
    finally:
        llm.engine.close()


@pytest.mark.long
def test_graphs_that_go_bad_on_one_rank_give_no_wrong_token(alone: matrix.Alone) -> None:
    features = replace(COVERING, drafts=0)
    with faulty("graphs_go_bad"):
        llm = shared(alone, features).engine(ahead=True, graph_verify="canary:1")
    try:
        assert token_ids(shared(alone, features).answers(llm)) == alone.tokens(features)
        assert llm.graph_report().canary_failures
    finally:
        llm.engine.close()


@pytest.mark.long
def test_a_canary_that_one_rank_cannot_go_on_from_ends_all_alike(alone: matrix.Alone) -> None:
    """What each rank has left of the step is unlike: no token of it is given out."""
    features = replace(COVERING, drafts=0)
    with nothing_is_left():
        with faulty("loses_what_canaries_keep"):
            llm = shared(alone, features).engine(ahead=True, graph_verify="canary:1")
        try:
            with pytest.raises(RanksError, match="changed what its canary keeps"):
                shared(alone, features).answers(llm)
        finally:
            llm.engine.close()


@pytest.mark.long
def test_a_slow_rank_changes_no_token(alone: matrix.Alone) -> None:
    with faulty("is_slow"):
        llm = shared(alone, replace(COVERING, drafts=0)).engine(ahead=True)
    try:
        found = token_ids(shared(alone, replace(COVERING, drafts=0)).answers(llm))
        assert found == alone.tokens(replace(COVERING, drafts=0))
    finally:
        llm.engine.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("steps", [0, 1, 7, 30])
def test_whoever_waits_is_told_in_time(alone: matrix.Alone, kind: int, steps: int) -> None:
    llm = shared(alone, replace(COVERING, executor="none")).engine()
    inner = llm.engine
    (child,) = inner.runner._leader._followers._children
    try:
        inner.add("waiting", {"prompt_token_ids": [1, 2, 3]}, greedy(100, ignore_eos=True))
        for _ in range(steps):
            inner.step()
        began = time.monotonic()
        os.kill(child.pid, kind)
        with pytest.raises(RanksError, match="rank 1"):
            finish(inner)
        assert time.monotonic() - began < ANSWER_SECONDS
        assert child.poll() is not None
    finally:
        inner.close()


def work_on(engine: Engine) -> None:
    """Until it fails: what waits may be computed to its end before."""
    while True:
        finish(engine)
        engine.add("next", {"prompt_token_ids": [1, 2]}, greedy(50, ignore_eos=True))


@pytest.mark.long
@pytest.mark.parametrize("moment", range(20))
def test_twenty_moments(alone: matrix.Alone, moment: int) -> None:
    """Killed or stopped at any moment, within a collective of a replay too: while graphs run, with
    drafts, and while the engine ends."""
    rng = random.Random(moment)
    kind = rng.choice((signal.SIGKILL, signal.SIGSTOP))
    before = followers()
    llm = shared(alone, replace(COVERING, executor=rng.choice(("full", "breakable")))).engine()
    inner = llm.engine
    (child,) = inner.runner._leader._followers._children
    try:
        if moment % 5 == 4:  # idle, or on its way out
            os.kill(child.pid, kind)
        else:
            inner.add("waiting", {"prompt_token_ids": [1, 2, 3]}, greedy(100, ignore_eos=True))
            for _ in range(rng.randrange(20)):
                inner.step()
            lost = threading.Timer(rng.uniform(0, 0.05), os.kill, (child.pid, kind))
            lost.start()
            with pytest.raises(RanksError, match="rank 1"):
                work_on(inner)
            lost.join()
    finally:
        began = time.monotonic()
        inner.close()
        assert time.monotonic() - began < ANSWER_SECONDS
    assert child.poll() is not None
    assert set(followers()) <= set(before)


def test_a_killed_rank_is_named(llm: LLM) -> None:
    """Whoever waits gets the error, and whoever comes later."""
    (child,) = llm.engine.runner._leader._followers._children
    inner = llm.engine
    inner.add("waiting", {"prompt_token_ids": [1, 2, 3]}, greedy(80))
    inner.step()
    began = time.monotonic()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RanksError, match=KILLED):
        finish(inner)
    assert time.monotonic() - began < ANSWER_SECONDS
    with pytest.raises(RanksError, match=KILLED):
        llm.generate([{"prompt_token_ids": [1]}], greedy(1), use_tqdm=False)
    assert child.poll() is not None


def test_a_number_of_ranks_that_does_not_divide_is_refused(alone: matrix.Alone) -> None:
    with pytest.raises(ModelError, match=r"num_attention_heads.*can be shared by 1, 2"):
        shared(alone, replace(COVERING, executor="none")).engine(tensor_parallel_size=3)


EXPERTS = matrix.Features("full", "experts", 0)


@pytest.mark.parametrize(
    ("executor", "ranks"),
    [
        ("none", 2),
        *(pytest.param(each, 2, marks=pytest.mark.long) for each in ("full", "breakable")),
        pytest.param("full", 4, marks=pytest.mark.long),
    ],
)
def test_whole_experts_on_each_rank(alone: matrix.Alone, executor: str, ranks: int) -> None:
    features = replace(EXPERTS, executor=executor)
    llm = shared(alone, features).engine(tensor_parallel_size=ranks, enable_expert_parallel=True)
    try:
        mlp = llm.engine.runner.model.model.layers[0].mlp
        assert len(mlp.experts.down_proj.tensors["weight"]) * ranks == mlp.routing.experts
        assert token_ids(shared(alone, features).answers(llm)) == alone.tokens(features)
        if executor != "none":
            report = llm.graph_report()
            assert not report.quarantined
            assert sum(each.replays for each in report.graphs) > 0
    finally:
        llm.engine.close()


@pytest.mark.parametrize(
    ("executor", "ranks"),
    [
        ("none", 2),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (("full", 2), ("breakable", 2), ("full", 4))
        ),
    ],
)
def test_a_layer_that_drafts(
    alone: matrix.Alone, tiny: TinyModels, tmp_path: Path, executor: str, ranks: int
) -> None:
    """DeepSeek-V4, by groups of heads, with its layer for further tokens; how many it drafts
    changes with the number of requests."""
    model = NextLayer(tiny, tmp_path / "model").model
    mtp = {
        "method": "mtp", "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[1, 1, 1], [2, 9, 3]],
    }  # fmt: skip
    case = shared(alone, replace(EAGER, executor=executor))
    case = replace(case, model=model, subjects=case.subjects[:3])
    llm = case.engine(tensor_parallel_size=ranks, speculative_config=mtp)
    try:
        assert token_ids(case.answers(llm)) == matrix.alone(model, case.device, case.subjects)
        assert llm.stats().drafts.drafted > 0
        assert not llm.graph_report().quarantined
    finally:
        llm.engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_without_experts_has_none_to_spread(alone: matrix.Alone, ranks: int) -> None:
    with pytest.raises(ModelError, match="Qwen3ForCausalLM has no experts; leave it out"):
        shared(alone, replace(COVERING, executor="none")).engine(
            tensor_parallel_size=ranks, enable_expert_parallel=True
        )


LONG = [
    matrix.Features(executor, model, drafts)
    for executor in matrix.EXECUTORS
    for model in matrix.MODELS
    for drafts in (0, 3)
]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("features", LONG, ids=str)
def test_same_tokens_of_everything(alone: matrix.Alone, features: matrix.Features) -> None:
    made: list[LLM] = []

    class Kept(Shared):
        def engine(self, *, ahead: bool = False, **options: Any) -> LLM:
            made.append(super().engine(ahead=ahead, **options))
            return made[-1]

    case = shared(alone, features)
    kept = Kept(case.features, case.model, case.device, case.subjects, case.dtype, case.draft)
    try:
        assert not kept.different(alone.tokens(features))
    finally:
        for each in made:
            each.engine.close()


@pytest.mark.long
@pytest.mark.parametrize("executor", ["none", "full", "breakable"])
def test_texts_keep_to_their_grammars(
    alone: matrix.Alone, tiny: TinyModels, device: str, executor: str
) -> None:
    """Masks reach every rank: each draws by them, and drafts are verified under them."""
    pytest.importorskip("xgrammar")
    model = text_model(tiny, "qwen3")
    wanted = [None, {"regex": "([a-h]{2} ){5}[0-9]{6}"}, {"choice": ["yes", "no"]}]
    subjects = [
        (prompt, params if what is None else replace(
            params, structured_outputs=StructuredOutputsParams(**what)))
        for (prompt, params), what in zip(matrix.SUBJECTS, wanted * 4, strict=True)
    ]  # fmt: skip
    case = Shared(matrix.Features(executor, "plain", 3), model, device, subjects)
    found = case.engine(num_blocks=24, max_model_len=96)
    try:
        outputs = case.answers(found)
        assert token_ids(outputs) == matrix.alone(model, device, subjects)
        assert found.engine.grammars.num_masks > 0
    finally:
        found.engine.close()
    for output, what in zip(outputs, wanted * 4, strict=True):
        if what is not None and "regex" in what:
            assert re.match("[a-h]{2} ", output.outputs[0].text)


@pytest.mark.long
@pytest.mark.parametrize("executor", ["none", "full", "breakable"])
def test_four_ranks(alone: matrix.Alone, executor: str) -> None:
    """With fewer key and value heads than ranks, if the model has so few."""
    features = replace(COVERING, executor=executor)
    try:
        llm = shared(alone, features).engine(tensor_parallel_size=4)
    except ModelError as error:
        pytest.skip(str(error))
    try:
        assert token_ids(shared(alone, features).answers(llm)) == alone.tokens(features)
    finally:
        llm.engine.close()

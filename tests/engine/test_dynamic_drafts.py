"""How many tokens are drafted may change from step to step: no token does."""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from draft_heads import of_few_words, write_head
from drafting import metrics
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from matrix import change_drafts

from reprise import LLM, SamplingParams
from reprise.engine.draft_choice import AGAIN, CATCH_UP, TRIED, DraftChoice
from reprise.errors import ConfigError
from reprise.speculation import Speculation, parse_speculation

PROMPTS = [random_ids(number, 20 + 7 * number) for number in range(4)]
ASKED = [
    greedy(30),
    SamplingParams(temperature=0.8, seed=5, max_tokens=30, frequency_penalty=0.3, logprobs=1),
]


# ---- what is chosen ----------------------------------------------------------------------------


class Device:
    """Steps that take injected times, and drafts that count with injected chances."""

    def __init__(self, tokens: int, step: Callable[[int, int], float], chance: float) -> None:
        self.choice = DraftChoice(Speculation(tokens, measured=True))
        self.step, self.chance = step, chance
        self.taken: list[int] = []

    def run(self, requests: int, steps: int) -> None:
        for _ in range(steps):
            drafted = self.choice.choose(requests)
            tokens = sum(self.chance**place for place in range(drafted + 1))
            self.choice.observe(requests, drafted, self.step(requests, drafted), tokens)
            self.taken.append(drafted)


def bound_by_rows(requests: int, drafted: int) -> float:
    """Weights take 4 ms; from 64 rows on each takes as long as a sixty-fourth of them."""
    return 0.004 * max(1.0, requests * (1 + drafted) / 64) + 0.0003 * drafted


def test_drafts_are_made_where_they_pay(caplog: pytest.LogCaptureFixture) -> None:
    """One line says so for each range of requests."""
    device = Device(3, bound_by_rows, chance=0.6)
    with caplog.at_level(logging.INFO):
        for requests, best in ((1, 3), (8, 3), (64, 0), (8, 3), (57, 0)):
            device.run(requests, 2 * TRIED)
            device.run(requests, 1)
            assert device.taken[-1] == best, requests
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "drafts: 3 tokens a step for 1 requests",
        "drafts: 3 tokens a step for 5 to 8 requests",
        "drafts: 0 tokens a step for 33 to 64 requests",
    ]


def test_a_choice_is_looked_at_again_and_follows_what_counts() -> None:
    device = Device(4, bound_by_rows, chance=0.7)
    device.run(2, 3 * TRIED)
    assert device.taken[-1] == 4
    device.chance = 0.0
    device.run(2, AGAIN + 2 * TRIED)
    assert device.taken[-1] == 0
    tried = device.taken.count(0)
    device.chance = 0.7
    device.run(2, AGAIN + 2 * TRIED)
    assert device.taken[-1] == 4
    assert device.taken.count(0) < tried + AGAIN + 2 * TRIED


def test_trials_cost_little() -> None:
    device = Device(3, bound_by_rows, chance=0.0)
    device.run(1, 10 * AGAIN)
    assert device.taken.count(3) < 0.01 * len(device.taken) + 2 * TRIED


def test_a_draft_model_rests_where_drafts_have_paid_nowhere() -> None:
    """But not while numbers are tried, nor for a while before that; nor where they pay for fewer
    requests, which may be what is left of these."""
    device = Device(3, bound_by_rows, chance=0.0)
    rested = []
    for _ in range(AGAIN + 3 * TRIED):
        rested.append(device.choice.resting(64))
        device.run(64, 1)
    assert rested.count(True) == AGAIN - CATCH_UP
    assert not any(rested[: 2 * TRIED])
    assert all(rested[2 * TRIED : AGAIN + 2 * TRIED - CATCH_UP])
    assert device.taken[rested.index(True) : rested.index(True) + AGAIN] == [0] * AGAIN
    device.chance = 0.6
    device.run(4, 3 * TRIED)
    device.run(64, AGAIN)
    assert device.taken[-1] == 0
    assert not device.choice.resting(64)


def test_what_is_about_as_good_changes_nothing() -> None:
    turn = itertools.count()
    noise = random.Random(3)
    device = Device(3, lambda *_: 0.004 * (1 + 0.01 * noise.random() + 0 * next(turn)), chance=0.0)
    device.run(1, 20 * AGAIN)
    settled = device.taken[2 * TRIED + 2 :]
    assert sum(a != b for a, b in itertools.pairwise(settled)) <= 2 * 20


# ---- what is asked for -------------------------------------------------------------------------


def test_numbers_by_batch_size_are_read() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 5}
    found = parse_speculation(
        config | {"num_speculative_tokens_per_batch_size": [[1, 16, 5], [17, 64, 2], [65, 99, 0]]}
    )
    assert found is not None
    assert found.levels == (0, 2, 5)
    assert [found.level(each) for each in (1, 16, 17, 64, 65, 99, 100)] == [5, 5, 2, 2, 0, 0, 5]


@pytest.mark.parametrize(
    "value",
    [
        "often", [], [[1, 2]], [[0, 2, 1]], [[2, 1, 1]], [[1, 2, 4]], [[1, 4, 2], [4, 8, 1]],
        [[1, 2, -1]],
    ],
)  # fmt: skip
def test_other_numbers_are_refused_by_name(value: Any) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3}
    with pytest.raises(ConfigError, match="num_speculative_tokens_per_batch_size"):
        parse_speculation(config | {"num_speculative_tokens_per_batch_size": value})


# ---- steps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


def make(model: TinyModel, device: str, **options: Any) -> LLM:
    """Numbers of drafts from 0 to 3."""
    config = {
        "method": "draft_model", "model": str(model.path), "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[50, 60, 0], [61, 70, 1], [71, 80, 2]],
        **options.pop("draft", {}),
    }  # fmt: skip
    return make_llm(model, device, speculative_config=config, max_num_seqs=4, **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize("graphs", ["none", "full"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_any_change_leaves_the_tokens_as_they_are(
    model: TinyModel, device: str, graphs: str, ahead: int
) -> None:
    plain = make_llm(model, device, max_num_seqs=4)
    llm = make(
        model, device, graph_mode=graphs, graph_buckets="decode=2,4;mixed=64",
        max_num_batched_tokens=32,
    )  # fmt: skip
    llm.engine.pipeline.depth = ahead
    taken = change_drafts(llm, ahead)
    for params in ASKED:
        assert generate(llm, PROMPTS, params) == generate(plain, PROMPTS, params)
    assert set(taken) == {0, 1, 2, 3}
    assert llm.graph_report().quarantined == []
    found = metrics(llm)
    drafted = found["spec_decode_num_draft_tokens"]
    # The target drafts for itself, also behind steps in which nothing was drafted.
    assert found["spec_decode_num_accepted_tokens"] > 0.75 * drafted > 0


def test_nothing_is_drafted_for_those_who_want_nothing(model: TinyModel, device: str) -> None:
    llm = make(model, device)
    runner = llm.engine.runner
    passes: list[str] = []
    for name, owner in runner.drafter.owners.items():

        def counted(shape: Any, *others: Any, name: str = name, run: Any = owner.run) -> Any:
            passes.append(f"{name} {shape.phase}")
            return run(shape, *others)

        owner.run = counted
    widths: set[int] = set()
    submit = runner.submit

    def seen(step: Any, *others: Any) -> None:
        widths.update(step.drafts[: step.num_decodes])
        submit(step, *others)

    runner.submit = seen
    params = greedy(20, num_drafts=0)
    right = generate(make_llm(model, device), PROMPTS, params)
    assert generate(llm, PROMPTS, params) == right
    assert set(passes) == {"draft prefill mixed"}, "so that others may share prefixes"
    assert widths == {0}
    passes.clear()
    assert generate(llm, PROMPTS, greedy(20)) == right
    assert "draft chain decode" in passes


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_what_rests_leaves_decodes_out(
    tiny: TinyModels, device: str, tmp_path: Path, method: str
) -> None:
    """And goes on from what it has: that changes no token."""
    model = of_few_words(tiny("qwen3", num_hidden_layers=4), tmp_path / "model")
    path = model.path
    if method == "eagle3":
        path = write_head(tmp_path / "head", model, imitates=True, norm_before_residual=True)
    llm = make(model, device, draft={"method": method, "model": str(path)})
    scheduler, drafter = llm.engine.scheduler, llm.engine.runner.drafter
    steps: list[tuple[bool, bool]] = []
    passes: list[str] = []
    for name, owner in drafter.owners.items():

        def counted(shape: Any, *others: Any, name: str = name, run: Any = owner.run) -> Any:
            passes.append(f"{name} {shape.phase}")
            return run(shape, *others)

        owner.run = counted
    propose = drafter.propose

    def seen(step: Any, *others: Any) -> None:
        passes.clear()
        propose(step, *others)
        if step.num_decodes == len(step.rows):
            steps.append((step.resting, bool(passes)))
        else:
            assert "draft prefill mixed" in passes

    drafter.propose = seen
    number = itertools.count()
    scheduler.planner.drafting = lambda requests: 0 if next(number) % 24 < 12 else 3
    scheduler.planner.resting = lambda requests: True
    right = generate(make_llm(model, device, max_num_seqs=4), PROMPTS, greedy(60))
    assert generate(llm, PROMPTS, greedy(60)) == right
    assert set(steps) == {(True, False), (False, True)}


@pytest.mark.parametrize("graphs", ["none", pytest.param("full", marks=pytest.mark.long)])
def test_a_head_goes_on_behind_steps_without_drafts(
    tiny: TinyModels, device: str, tmp_path: Path, graphs: str
) -> None:
    model = of_few_words(tiny("qwen3", num_hidden_layers=4), tmp_path / "model")
    head = write_head(tmp_path / "head", model, imitates=True, norm_before_residual=True)
    plain = make_llm(model, device, max_num_seqs=4)
    llm = make(
        model, device, draft={"method": "eagle3", "model": str(head)}, graph_mode=graphs,
        graph_buckets="decode=2,4;mixed=64", max_num_batched_tokens=32,
    )  # fmt: skip
    taken = change_drafts(llm, 7)
    for params in ASKED:
        assert generate(llm, PROMPTS, params) == generate(plain, PROMPTS, params)
    assert set(taken) == {0, 1, 2, 3}
    assert llm.graph_report().quarantined == []


@pytest.mark.long
def test_states_are_carried_over_whatever_was_verified(tiny: TinyModels, device: str) -> None:
    """Of a model with recurrent layers."""
    model = tiny("qwen3_5")
    plain = make_llm(model, device, max_num_seqs=4)
    llm = make_llm(
        model, device, max_num_seqs=4,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1,
            "num_speculative_tokens_per_batch_size": [[50, 60, 0], [61, 70, 1]],
        },
    )  # fmt: skip
    change_drafts(llm, 1)
    for params in ASKED:
        assert generate(llm, PROMPTS, params) == generate(plain, PROMPTS, params)


def test_it_measures_itself(
    model: TinyModel, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From the engine's own steps, and what it finds is what it takes."""
    caplog.set_level(logging.INFO, "reprise.engine.draft_choice")
    llm = make(model, device, draft={"num_speculative_tokens_per_batch_size": "auto"})
    plain = make_llm(model, device)
    prompts = PROMPTS[:2]
    params = greedy(80)
    assert generate(llm, prompts, params) == generate(plain, prompts, params)
    told = [
        each.message for each in caplog.records if "tokens a step for 2 requests" in each.message
    ]
    assert len(told) == 1
    assert re.fullmatch(r"drafts: [03] tokens .*\(3: .* ms; 0: .* ms\)", told[0])


@pytest.mark.parametrize("rest", [1, 3])
def test_a_chain_knows_the_blocks_that_came_while_nothing_was_drafted(
    tiny: TinyModels, device: str, rest: int
) -> None:
    """It went on from its last step's tables, and drafted behind a context with holes."""
    model = tiny("qwen3")
    ranges = [[100, 100, 3], [101, 101, 0]]
    llm = make_llm(
        model, device, max_num_seqs=2, block_size=1, num_blocks=96, speculative_config={
            "method": "draft_model", "model": str(model.path), "num_speculative_tokens": 3,
            "num_speculative_tokens_per_batch_size": ranges,
        },
    )  # fmt: skip
    turns = itertools.cycle([3, 3, *[0] * rest])
    llm.engine.scheduler.planner.drafting = lambda requests: next(turns)
    drafter: Any = llm.engine.runner.drafter
    inputs, rows = drafter.inputs, llm.engine.runner.buffers.rows
    follow, followed = inputs.follow, []

    def noted(step: Any, chosen: Any, *args: Any, **options: Any) -> None:
        follow(step, chosen, *args, **options)
        mine = [step.rows[each] for each in chosen]
        followed.append((inputs.block_tables[:, : len(mine)] == rows.tables[:, mine]).all().item())

    inputs.follow = noted
    generate(llm, PROMPTS[:2], greedy(40))
    assert len(followed) > 5
    assert all(followed)

"""A model that drafts changes how many tokens come of a step, and no token."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting import EXECUTORS, check_counters, metrics, rate
from helpers import (
    VOCAB,
    TinyModel,
    TinyModels,
    copied_inputs,
    generate,
    greedy,
    make_llm,
    random_ids,
)
from planted import OPTIONS, make_oracle, planted, serve
from test_drafts import NGRAM, PARAMS, PROMPTS, OtherOrder, answers
from torch import Tensor

from reprise import LLM
from reprise.engine import draft_counts
from reprise.errors import ConfigError, ModelError
from reprise.graphs import Buckets, GraphPool, GraphRunner, capture, parse_plan, parse_verify
from reprise.ops.registry import all_ops
from reprise.runner.drafts import GraphOptions, ModelDrafter
from reprise.testing import faults
from reprise.testing.faults.planted import PlantedFault, tokens_of

MOST = [PARAMS[number] for number in (1, 4, 6, 7)]
"""Seeds, penalties, log probabilities, minima and stops."""
PLAIN = [params for params in PARAMS if not params.min_tokens and params.logit_bias is None
         and not (params.frequency_penalty or params.presence_penalty)]  # fmt: skip
"""What a draft model draws from as the target does."""


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def near(tiny: TinyModels, model: TinyModel) -> TinyModel:
    return tiny.near(model)


@pytest.fixture(scope="module")
def other(tiny: TinyModels) -> TinyModel:
    """Of another architecture and other sizes."""
    return tiny("llama", seed=4, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1)


def drafting(model: TinyModel, draft: TinyModel | Path, device: str, k: int, **options: Any) -> LLM:
    path = draft.path if isinstance(draft, TinyModel) else draft
    config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": k}
    config |= options.pop("others", {})
    return make_llm(model, device, speculative_config=config, **options)


@pytest.fixture(scope="module")
def plain_answers(model: TinyModel, device: str) -> list[list[Any]]:
    plain = make_llm(model, device)
    return [answers(plain, params) for params in MOST]


SETUPS = {
    **EXECUTORS,
    "two at a time": {
        "graph_mode": "decode=full,mixed=none",
        "graph_buckets": "decode=1,4",
        "max_num_seqs": 3,
    },
}


@pytest.mark.parametrize(
    ("k", "which", "ahead"),
    [
        pytest.param(
            k, which, ahead, id=f"{which}, {k}{', ahead' * ahead}",
            marks=[pytest.mark.long] * (number != 1),
        )
        for number, (k, which, ahead) in enumerate(
            (k, which, ahead)
            for k, which in ((1, "full"), (3, "eager"), (4, "breakable"), (7, "two at a time"))
            for ahead in (False, True)
        )
    ],
)  # fmt: skip
def test_tokens_are_those_without_drafts(
    model: TinyModel, near: TinyModel, device: str, plain_answers: list[list[Any]],
    monkeypatch: pytest.MonkeyPatch, k: int, which: str, ahead: bool,
) -> None:  # fmt: skip
    """Whatever a request asks for, seeds included."""
    if ahead:
        copied_inputs(monkeypatch)
    llm = drafting(model, near, device, k, **SETUPS[which])
    if ahead:
        llm.engine.pipeline.depth = 2
    for params, right in zip(MOST, plain_answers, strict=True):
        for got, expected in zip(answers(llm, params), right, strict=True):
            assert got.token_ids == expected.token_ids
            assert (got.finish_reason, got.stop_reason) == (
                expected.finish_reason, expected.stop_reason,
            )  # fmt: skip
    assert 0.1 < rate(llm) < 0.9
    report = llm.graph_report()
    assert report.quarantined == []
    owners = {"", "draft chain", "draft prefill"}
    # A decode has no prefill behind it.
    expected = {"eager": set(), "two at a time": {"", "draft chain"}}.get(which, owners)
    assert {each.owner for each in report.graphs} == expected


@pytest.mark.parametrize("which", ["eager", pytest.param("full", marks=pytest.mark.long)])
def test_the_target_as_its_own_draft_is_always_right(
    model: TinyModel, device: str, which: str
) -> None:
    """Greedy and with seeds, since it draws with the same number; behind chunks, prefix hits,
    requests that are computed again, and beside others that do anything of it."""
    llm = drafting(model, model, device, 4, **{**OPTIONS, **SETUPS[which]})
    for params in PLAIN:
        answers(llm, params)
        assert rate(llm) == 1
    serve(llm)
    assert llm.stats().scheduler.total_preemptions > 0
    assert llm.stats().scheduler.total_prefix_hits > 0
    assert rate(llm) == 1


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 4])
def test_counters_are_those_of_the_draft_model(
    model: TinyModel, near: TinyModel, device: str, k: int
) -> None:
    """Exactly those that transformers' model would have."""

    def propose(text: list[int]) -> list[int]:
        found = list(text)
        for _ in range(k):
            found.append(int(near.logits(found)[-1].argmax()))
        return found[len(text) :]

    check_counters(drafting(model, near, device, k), PROMPTS[:3], propose, accepted=15)


@pytest.mark.long
def test_any_draft_model_of_the_same_tokens_does(
    model: TinyModel, other: TinyModel, device: str
) -> None:
    """Other layers, heads and sizes; chunks, prefix hits, preemption."""
    right = make_oracle(model, device)()
    llm = drafting(model, other, device, 3, **{**OPTIONS, "graph_mode": "none"})
    assert serve(llm) == right
    assert 0 < rate(llm) < 0.3


def test_what_is_counted_is_told(
    model: TinyModel, near: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """In stats, metrics and the log alike."""
    llm = drafting(model, near, device, 3)
    with caplog.at_level(logging.INFO, "reprise.engine.draft_counts"):
        generate(llm, PROMPTS, greedy(12))
        assert caplog.text == ""
        monkeypatch.setattr(draft_counts, "EVERY", 0.0)
        generate(llm, PROMPTS, greedy(12))
    stats, counted = llm.stats().drafts, metrics(llm)
    assert stats.drafts == counted["spec_decode_num_drafts"] > 0
    assert stats.drafted == counted["spec_decode_num_draft_tokens"] <= 3 * stats.drafts
    assert stats.accepted == counted["spec_decode_num_accepted_tokens"]
    rates = stats.position_rates
    assert rates == sorted(rates, reverse=True)
    assert stats.acceptance_length == pytest.approx(1 + sum(rates))
    lines = [each for each in caplog.messages if "acceptance length" in each]
    told = sum(int(re.search(r"of (\d+) drafted", each)[1]) for each in lines)  # type: ignore[index]
    assert told == stats.drafted


def test_a_dense_model_drafts_for_a_recurrent_one(
    tiny: TinyModels, device: str, near: TinyModel
) -> None:
    hybrid = tiny("qwen3_5", num_hidden_layers=2, full_attention_interval=2)
    plain = generate(make_llm(hybrid, device), PROMPTS, greedy(20))
    llm = drafting(hybrid, near, device, 3)
    assert generate(llm, PROMPTS, greedy(20)) == plain


def test_a_recurrent_model_drafts_for_a_dense_one(
    tiny: TinyModels, device: str, near: TinyModel
) -> None:
    """One step ahead, behind prefixes too: where the draft's states are."""
    hybrid = tiny("qwen3_5", num_hidden_layers=2, full_attention_interval=2)
    prompts = [[*PROMPTS[0], *random_ids(40, 70)], *PROMPTS]
    plain = generate(make_llm(near, device), prompts, greedy(20))
    llm = drafting(near, hybrid, device, 3, graph_mode="full", graph_buckets="decode=2,8")
    llm.engine.pipeline.depth = 2
    for _ in range(2):
        assert generate(llm, prompts, greedy(20)) == plain
    assert llm.stats().scheduler.total_prefix_hits > 0
    assert not llm.graph_report().quarantined


def test_requests_may_want_fewer_drafts(model: TinyModel, device: str) -> None:
    """Those beside them get all of theirs, and nobody gets other tokens."""
    limits = (0, None, 1, 3)
    right = generate(make_llm(model, device), PROMPTS, greedy(24))
    for config in (NGRAM, {"method": "draft_model", "model": str(model.path)}):
        llm = make_llm(model, device, speculative_config={**config, "num_speculative_tokens": 3})
        params = [greedy(24, num_drafts=each) for each in limits]
        assert generate(llm, PROMPTS, params) == right
        most = [llm.stats().drafts.drafted]
        for number, params in enumerate(limits):
            before = llm.stats().drafts
            generate(llm, [PROMPTS[number]], greedy(24, num_drafts=params))
            made = llm.stats().drafts - before
            assert made.drafted <= made.drafts * (3 if params is None else params)
            most.append(made.drafted)
        # The target as its own draft is right as often as it may be.
        if config is not NGRAM:
            assert most[0] == sum(most[1:])
            assert rate(llm) == 1


def test_drafts_that_count_by_chance_are_computed(
    model: TinyModel, other: TinyModel, device: str
) -> None:
    """For measurements: their chance is that which was asked for, and the draft model runs."""
    options = {"graph_mode": "decode=full,mixed=none", "graph_buckets": "decode=4"}
    llm = drafting(model, other, device, 3, others={"synthetic_acceptance": 0.8}, **options)
    torch.manual_seed(0)
    generate(llm, PROMPTS * 4, greedy(60))
    first, second, third = llm.stats().drafts.position_rates
    assert (first, second, third) == pytest.approx((0.8, 0.64, 0.51), abs=0.1)
    generate(llm, PROMPTS[:1], greedy(8))  # however the others ended, a step of few rows
    used = {each.owner for each in llm.graph_report().graphs if each.replays + each.eager_steps}
    assert used == {"", "draft chain"}


def test_a_draft_model_of_other_tokens_is_refused(
    tiny: TinyModels, model: TinyModel, device: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model='.*' has a vocabulary of 128 .* 160"):
        drafting(model, tiny("qwen3", vocab_size=128), device, 3)
    with pytest.raises(ModelError, match="no such directory"):
        drafting(model, tmp_path / "nothing", device, 3)


# ---- graphs that are wrong -------------------------------------------------------------------

OWNERS = ("target", "draft prefill", "draft chain")
_SHOWN = ("stale_scalar", "wrong_extent", "unwritten_output", "padding_writes_live",
          "changed_tables", "cache_overrun")  # fmt: skip


@pytest.fixture(scope="module")
def eager(model: TinyModel, near: TinyModel, device: str) -> LLM:
    return drafting(model, near, device, 3)


@contextlib.contextmanager
def captured(llm: LLM, owner: str) -> Iterator[Callable[[], GraphRunner]]:
    """Captures graphs of one owner; afterwards the engine is as it was."""
    runner = llm.engine.runner
    drafter = runner.drafter
    assert isinstance(drafter, ModelDrafter)
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "target": (runner.forward_pass, runner.buffers, (4,)),
        "draft prefill": (drafter.prefill, runner.buffers, (4,)),
        "draft chain": (drafter.chain, drafter.inputs, drafter.inputs.widths),
    }
    plan = "decode=none,mixed=full" if owner == "draft prefill" else "decode=full,mixed=none"
    options = GraphOptions(
        parse_plan(plan),
        Buckets((3,), (24,)),
        8,
        parse_verify("startup"),
        GraphPool(runner.platform),
    )

    def capture() -> GraphRunner:
        made = options.runner(*kinds[owner], owner)
        made.captures.capture_all()
        return made

    try:
        yield capture
    finally:
        runner.forget_steps()


@pytest.mark.parametrize(
    ("owner", "fault"),
    [
        pytest.param(owner, fault, marks=[pytest.mark.long] * ((number + turn) % 3 > 0))
        for turn, owner in enumerate(OWNERS)
        for number, fault in enumerate(_SHOWN)
    ],
)
def test_each_owners_graphs_are_proven(
    eager: LLM, owner: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault in any of them is found at start, and named."""
    runner = eager.engine.runner
    op = "rotary_cache" if fault == "padding_writes_live" else "paged_attention"
    with (
        caplog.at_level(logging.CRITICAL),
        captured(eager, owner) as capture,
        faults.inject(fault, runner.ops, op, runner.forward_pass),
    ):
        graphs = capture()
    (refused,) = graphs.report().quarantined
    assert refused.name.startswith(owner)
    if faults.FAULTS[fault].traced:
        assert f"{op} #" in str(refused.quarantined)


class Compiled:
    """Stands for the compiler, which would take a minute: what it makes is wrong by a factor."""

    def __init__(self, wrong: float) -> None:
        self.wrong = wrong
        self.passes = 0

    def __call__(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            self.passes += 1
            return model(*args) * (1 + self.wrong)

        return run


@pytest.mark.parametrize("wrong", [0.0, 1e-6, 0.05])
def test_the_passes_of_a_compiled_chain_are_compared_within_a_bound(
    model: TinyModel, near: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """Whatever they draw, and what is not within it is refused."""
    compiler = Compiled(wrong)
    monkeypatch.setattr(capture, "compile_model", compiler)
    llm = drafting(model, near, device, 3, graph_mode="compiled", graph_buckets="decode=4;mixed=32",
                   max_num_batched_tokens=32)  # fmt: skip
    assert compiler.passes > 0
    chains = [each for each in llm.graph_report().graphs if each.owner == "draft chain"]
    (chain,) = chains
    assert chain.executor == ("breakable" if wrong > 0.01 else "compiled")
    if wrong > 0.01:
        assert "draft passes differs" in str(chain.quarantined)
        return
    assert chain.quarantined is None
    assert generate(llm, PROMPTS, greedy(20)) == generate(
        make_llm(model, device), PROMPTS, greedy(20)
    )
    assert chain.replays > 0
    assert rate(llm) > 0.1


def test_a_chain_goes_on_from_what_it_is_given(
    model: TinyModel, near: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a compiled one that draws another token would be wrong in all passes behind it."""
    monkeypatch.setattr(capture, "compile_model", Compiled(0.0))
    llm = drafting(model, near, device, 4, graph_mode="decode=compiled,mixed=none",
                   graph_buckets="decode=2")  # fmt: skip
    drafter = llm.engine.runner.drafter
    assert isinstance(drafter, ModelDrafter)
    chain = drafter.chain
    ((_, bucket),) = drafter.owners["draft chain"].bucket_graphs.items()
    assert bucket.graph is not None
    with torch.inference_mode(), chain.ops.computing():
        bucket.probes[0].fill()
        bucket.graph.replay()
        free = {name: each.clone() for name, each in chain.outputs(bucket.shape).items()}
        chain._drawn[0] = (chain._drawn[0] + 1) % VOCAB
        with chain.follow(bucket.shape):
            bucket.graph.replay()
        held = chain.outputs(bucket.shape)
        assert ((held["drafts"][0] - free["drafts"][0]) % VOCAB == 1).all()
        assert torch.equal(held["draft passes"][0], free["draft passes"][0])
        assert not torch.equal(held["draft passes"][1], free["draft passes"][1])
        bucket.graph.replay()
        assert torch.equal(chain.outputs(bucket.shape)["drafts"], free["drafts"])


class LaterPasses(PlantedFault):
    """What real engines had: metadata of later passes are those of the first."""

    name = "later_passes"
    summary = "passes behind the first see nothing of what it has written"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        tokens = tokens_of(named)
        blind = self.active & tokens.live & (tokens.new == 1) & (tokens.begin > 0)
        named["out"].copy_(torch.where(blind.view(-1, 1, 1), 0, named["out"]))
        return result


class IntoTheTarget(PlantedFault):
    name = "into_the_target"
    summary = "rows of a draft layer go to one of the target's as well"

    def harm(self, named: dict[str, Any], result: Any) -> Any:
        rows = self.victim.flatten(0, 1)
        rows[named["slot_mapping"]] += self.active.to(rows.dtype)
        return result

    victim: Tensor


def test_a_chain_that_writes_the_targets_cache_is_found(
    eager: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    runner = eager.engine.runner
    broken = IntoTheTarget(runner.ops, all_ops()["rotary_cache"])
    broken.victim = runner.caches["layer 1"].tensors["key"]
    with caplog.at_level(logging.CRITICAL), captured(eager, "draft chain") as capture:
        assert capture().report().quarantined == []
        runner.ops.functions["rotary_cache"] = broken
        graphs = capture()
        broken.close()
    (refused,) = graphs.report().quarantined
    assert ": layer 1 key differs" in str(refused.quarantined)
    assert "draft layer" not in str(refused.quarantined)


@pytest.mark.parametrize(
    "verify", ["off", pytest.param("startup", marks=pytest.mark.long), "canary:1"]
)
def test_wrong_drafts_cost_acceptance_and_are_found(
    model: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, verify: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The text is right with any drafts: what is counted tells."""
    options = {"graph_mode": "decode=full,mixed=none", "graph_buckets": "decode=2,4"}
    later = verify == "canary:1"  # the fault begins when the graphs have been proven
    with planted(monkeypatch, LaterPasses, "paged_attention", active=not later) as found:
        llm = drafting(model, model, device, 4, **options, graph_verify=verify)
    with caplog.at_level(logging.WARNING):
        for each in found:
            each.active.fill_(True)
        generate(llm, PROMPTS, greedy(20))
    outputs = generate(llm, PROMPTS[:2], greedy(20))
    for prompt, output in zip(PROMPTS, outputs, strict=False):
        assert model.is_greedy(prompt, output)
    refused = [each.name for each in llm.graph_report().quarantined]
    assert (rate(llm) == 1) == (verify != "off")
    if verify == "off":
        assert rate(llm) < 0.7
        assert refused == []
    else:
        assert refused
        assert all(each.startswith("draft chain decode") for each in refused)
    if later:
        assert "no token is wrong" in caplog.text
        assert "suspect_from" not in caplog.text


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 3])
def test_no_right_graph_is_refused_at_the_end_of_the_context(
    model: TinyModel, near: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """Drafts without a place are written to the null block, in whatever order, and never count."""
    options = {"graph_mode": "full", "graph_buckets": "decode=1,4;mixed=8"}
    limits = {"max_num_seqs": 3, "block_size": 2, "max_model_len": 80, "num_blocks": 129}
    plain = make_llm(model, device, **limits)
    with planted(monkeypatch, OtherOrder, "rotary_cache"):
        llm = drafting(
            model, near, device, k, **options, **limits, max_num_batched_tokens=16,
            graph_verify="canary:1",
        )  # fmt: skip
    for params in (greedy(60), greedy(7)):
        assert generate(llm, PROMPTS, params) == generate(plain, PROMPTS, params)
    report = llm.graph_report()
    assert {each.owner for each in report.graphs if each.canaries} == {"", *OWNERS[1:]}
    assert [each.quarantined for each in report.graphs] == [None] * len(report.graphs)
    drafts = llm.stats().drafts
    if k > 1:  # a row that has room for none of one has no drafts to count
        assert drafts.drafted < k * drafts.drafts, "none is made behind the end"


@pytest.mark.parametrize("owner", OWNERS[1:])
def test_a_replay_that_raises_costs_its_graph_alone(
    model: TinyModel, near: TinyModel, device: str, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    llm = drafting(
        model, near, device, 3, graph_mode="full", graph_buckets="decode=4;mixed=256",
        graph_verify="off",
    )  # fmt: skip
    right = generate(llm, PROMPTS, greedy(20))
    graphs = dict(llm.engine.runner.owners)[owner].bucket_graphs

    def raises() -> None:
        raise RuntimeError("the driver says no")

    for each in graphs.values():
        if each.graph is not None:
            monkeypatch.setattr(each.graph, "replay", raises)
    llm.engine.scheduler.reset_prefix_cache()
    assert generate(llm, PROMPTS, greedy(20)) == right
    refused = llm.graph_report().quarantined
    assert refused
    assert {each.owner for each in refused} == {owner}


def test_weights_of_the_draft_that_a_graph_changes_are_loaded_again(
    eager: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    runner = eager.engine.runner
    drafter = runner.drafter
    assert isinstance(drafter, ModelDrafter)
    before = {name: each.clone() for name, each in drafter.draft.named_parameters()}
    with (
        caplog.at_level(logging.CRITICAL),
        captured(eager, "draft chain") as capture,
        faults.inject("changed_weight", runner.ops, "rotary_cache", runner.forward_pass),
    ):
        graphs = capture()
    assert graphs.report().quarantined
    for name, each in drafter.draft.named_parameters():
        assert torch.equal(each, before[name]), name

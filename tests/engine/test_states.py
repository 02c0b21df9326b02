"""Layers whose cache is one state a request: the tokens are those of a run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import recurrent
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids, token_ids
from planted import planted
from recurrent import CHECKPOINT, hybrids

from reprise import LLM, SamplingParams
from reprise.errors import ConfigError
from reprise.runner.written_rows import WrittenRows
from reprise.step import Step
from reprise.testing import faults

STEPS = 20
CANARY = {"graph_verify": "canary:1"}
SHARED = random_ids(7, 3 * CHECKPOINT)
PROMPTS = [
    random_ids(1, 1),
    [*SHARED, *random_ids(2, 5)],
    random_ids(3, 2 * CHECKPOINT),
    [*SHARED, *random_ids(4, 20)],
    random_ids(5, 33),
]
SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=STEPS)


@pytest.fixture(scope="module", autouse=True)
def hybrid_models() -> Iterator[None]:
    with hybrids():
        yield


@dataclass
class Known:
    model: TinyModel
    greedy: list[list[int]]
    sampled: list[list[int]]


@pytest.fixture(scope="module")
def known(tiny: TinyModels, device: str, hybrid_models: None) -> Known:
    model = tiny("llama", num_hidden_layers=3)
    llm = make_llm(model, device, enable_prefix_caching=False)
    alone = [generate(llm, [prompt], greedy(STEPS))[0] for prompt in PROMPTS]
    sampled = [generate(llm, [prompt], SAMPLED)[0] for prompt in PROMPTS]
    assert len({tuple(each) for each in alone}) == len(alone)
    return Known(model, alone, sampled)


def drafting(tokens: int) -> dict[str, Any]:
    config = {"method": "ngram", "num_speculative_tokens": tokens,
              "prompt_lookup_max": 2, "prompt_lookup_min": 1}  # fmt: skip
    return {"speculative_config": config}


def check(known: Known, llm: LLM) -> None:
    assert generate(llm, PROMPTS, greedy(STEPS)) == known.greedy
    assert generate(llm, PROMPTS, SAMPLED) == known.sampled


def states(llm: LLM) -> list[torch.Tensor]:
    caches = llm.engine.runner.model.caches().values()
    return [each.tensors["state"] for each in caches if "state" in each.tensors]


def change(llm: LLM, how: Callable[[torch.Tensor], Any]) -> None:
    with torch.inference_mode():
        for each in states(llm):
            how(each)


def test_each_token_is_that_of_a_fresh_prompt(known: Known, device: str) -> None:
    """A state that decodes have made is that of a prompt computed at once."""
    llm = make_llm(known.model, device, enable_prefix_caching=False)
    for prompt, output in zip(PROMPTS, known.greedy, strict=True):
        longer = [[*prompt, *output[:count]] for count in (1, 7, STEPS - 1)]
        found = generate(llm, longer, greedy(1))
        assert [each[0] for each in found] == [output[count] for count in (1, 7, STEPS - 1)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="in one batch"),
        pytest.param({"max_num_seqs": 2, "max_num_batched_tokens": 7}, id="chunks of 7"),
        pytest.param({"max_num_seqs": 1, "max_num_batched_tokens": 1}, id="chunks of 1"),
        pytest.param({"block_size": 8}, id="smaller blocks"),
        pytest.param({"enable_prefix_caching": False}, id="no prefix cache"),
        pytest.param({"kv_cache_memory_bytes": 1 << 16, "num_blocks": None}, id="few slots"),
        pytest.param({"graph_mode": "full", "graph_verify": "canary:1"}, id="full"),
        pytest.param({"graph_mode": "breakable", "graph_verify": "canary:1"}, id="breakable"),
        pytest.param({"graph_mode": "full", "num_blocks": 33}, id="proven at start"),
        pytest.param(drafting(1), id="one draft", marks=pytest.mark.long),
        pytest.param(
            {**drafting(3), **CANARY, "graph_mode": "full"},
            id="drafts, full",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {**drafting(7), **CANARY, "graph_mode": "breakable", "max_num_seqs": 4},
            id="drafts, breakable",
        ),
        pytest.param(
            {**drafting(3), "max_num_seqs": 2, "max_num_batched_tokens": 11},
            id="drafts beside chunks",
        ),
        pytest.param(
            {**drafting(3), "graph_mode": "full", "num_blocks": 33}, id="drafts, proven at start"
        ),
    ],
)
def test_same_tokens(
    known: Known, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """One step ahead, over memory that is poisoned."""
    graphs = {"graph_buckets": "decode=2,8;mixed=32", "max_num_batched_tokens": 32}
    llm = make_llm(known.model, device, **{**graphs, **options})
    llm.engine.pipeline.depth = 2
    change(llm, lambda state: state.fill_(float("nan")))  # the null slot too
    scheduler, counts = llm.engine.scheduler, set[int]()
    update = scheduler.update

    def seen(step: Step, sampled: Any, *others: Any) -> Any:
        counts.update(len(each) for each in sampled[: step.num_decodes])
        return update(step, sampled, *others)

    monkeypatch.setattr(scheduler, "update", seen)
    check(known, llm)
    if "speculative_config" in options:
        assert 1 in counts, "drafts were rejected"
        assert max(counts) > 1, "drafts were accepted"
    report = llm.graph_report()
    assert not report.quarantined
    assert not report.canary_failures
    for each in states(llm):
        assert each[0].isnan().all(), "padding changes no state"


def test_a_prefix_goes_on_from_a_copy(known: Known, device: str) -> None:
    llm = make_llm(known.model, device)
    runner = llm.engine.runner
    for _ in range(2):
        check(known, llm)
    stats = llm.stats().scheduler
    assert stats.total_prefix_hits >= len(SHARED)
    assert stats.total_prefix_hits % CHECKPOINT == 0
    # A checkpoint that is wrong makes those wrong who go on from it: it was no accident.
    slots = runner.cache_layout.pools[1].num_blocks
    change(llm, lambda state: state[1:slots].neg_())
    assert generate(llm, PROMPTS, greedy(STEPS)) != known.greedy
    llm.reset_prefix_cache()
    check(known, llm)


@pytest.mark.parametrize("drafts", [0, 3])
def test_preemption(known: Known, device: str, drafts: int) -> None:
    options = drafting(drafts) if drafts else {}
    for params, expected in ((greedy(STEPS), known.greedy), (SAMPLED, known.sampled)):
        # Another one each time: what is cached decides who has to give way.
        llm = make_llm(
            known.model, device, num_blocks=8, max_model_len=96, block_size=16, **options
        )
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert token_ids(outputs) == expected
        assert sum(each.metrics.num_preemptions for each in outputs) > 0


def test_states_take_half_of_the_memory_at_most(
    known: Known, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory = 1 << 16
    with caplog.at_level("INFO"):
        llm = make_llm(known.model, device, num_blocks=None, kv_cache_memory_bytes=memory)
    kept, slots = llm.engine.runner.cache_layout.pools
    assert slots.num_blocks * slots.block_bytes <= memory / 2
    assert memory / 2 - kept.block_bytes < kept.num_blocks * kept.block_bytes
    assert any("(state)" in each.message and "half" in each.message for each in caplog.records)
    check(known, llm)


def test_a_state_that_cannot_take_drafts_back_is_refused_by_name(
    known: Known, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a layer that was written before there were any."""
    monkeypatch.setattr(recurrent, "takes_back", lambda build: 0)
    with pytest.raises(ConfigError, match=r"speculative_config: the state of layer 0 cannot take"):
        make_llm(known.model, device, **drafting(1))


FAULTS = (
    "state_not_zeroed", "state_twice", "state_of_another", "state_forgotten",
    "state_of_rejected_drafts", "stale_accepted", "chunk_replays_nothing",
)  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("executor", ["full", "breakable"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_is_wrong_about_states_is_refused(
    known: Known, device: str, monkeypatch: pytest.MonkeyPatch, fault: str, executor: str
) -> None:
    with planted(monkeypatch, faults.FAULTS[fault], "delta_rule"):
        llm = make_llm(
            known.model, device, graph_mode=executor, graph_buckets="decode=2,8;mixed=32",
            max_num_batched_tokens=32, **faults.FAULTS[fault].engine_options,
        )  # fmt: skip
        check(known, llm)
    report = llm.graph_report()
    assert report.quarantined
    assert "delta_rule #" in " ".join(each.quarantined for each in report.quarantined)


def test_states_are_put_back_between_the_runs_of_a_comparison(
    known: Known, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were they not, a right graph would be called wrong: the toy tells both runs apart."""
    with monkeypatch.context() as patch:
        patch.setattr(
            WrittenRows, "write",
            lambda self, values: [
                each.tensor.__setitem__(each.written, values[name])
                for name, each in self._rows.items()
                if not each.of_requests
            ],
        )  # fmt: skip
        llm = make_llm(known.model, device, graph_mode="full", graph_buckets="decode=2;mixed=32",
                       max_num_batched_tokens=32)  # fmt: skip
    assert all(each.quarantined for each in llm.graph_report().graphs)

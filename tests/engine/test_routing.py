"""Graphs of models with experts: whoever goes where, and what may be wrong about it."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import TinyModels, assert_idle, generate, greedy, make_llm, random_ids
from planted import planted

from reprise.runner.probes import ProbeMaker
from reprise.testing import faults

OPTIONS: dict[str, Any] = {
    "graph_buckets": "decode=2,4,32;mixed=64", "max_num_batched_tokens": 64, "max_num_seqs": 32,
    "num_blocks": 160,
}  # fmt: skip
MANY = {"num_experts": 48, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
"""So many experts that rows of different tokens never crowd at one."""


PROMPTS = [random_ids(seed, 3 + 9 * seed) for seed in range(4)]


@pytest.fixture(scope="module")
def expected(tiny: TinyModels, device: str) -> list[list[int]]:
    """Of a tiny model, without graphs."""
    return generate(make_llm(tiny("qwen3_moe"), device), PROMPTS, greedy(5))


@pytest.mark.parametrize(
    "fault", [name for name, each in faults.FAULTS.items() if issubclass(each, faults.RoutingFault)]
)
@pytest.mark.parametrize("executor", ["full", pytest.param("breakable", marks=pytest.mark.long)])
def test_a_graph_that_sends_rows_elsewhere_is_refused(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
    fault: str, executor: str,
) -> None:  # fmt: skip
    phase = faults.FAULTS[fault].shows_in
    options = {**OPTIONS, "graph_buckets": "decode=4" if phase == "decode" else "decode=2;mixed=64"}
    with planted(monkeypatch, faults.FAULTS[fault], "experts_add"):
        llm = make_llm(tiny("qwen3_moe"), device, graph_mode=executor, **options)
        assert generate(llm, PROMPTS, greedy(5)) == expected
    report = llm.graph_report()
    assert phase in {each.phase for each in report.quarantined}
    assert "experts_add #" in " ".join(each.quarantined for each in report.quarantined)


def test_a_crowd_at_one_expert_is_probed(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of one prompt decode the same tokens, all of which go to the same experts."""
    model = tiny("qwen3_moe", **MANY)
    prompts = [random_ids(1, 7)] * 24
    expected = generate(
        make_llm(model, device, max_num_seqs=32, num_blocks=160), prompts, greedy(6)
    )

    def answers() -> tuple[list[list[int]], list[str]]:
        with planted(monkeypatch, faults.RowsBeyondTile, "experts_add"):
            llm = make_llm(model, device, graph_mode="full", **OPTIONS)
            report = llm.graph_report()
            early = [each.name for each in report.quarantined]
            found = generate(llm, prompts, greedy(6))
        assert_idle(llm)
        return found, early

    found, early = answers()
    assert found == expected
    assert {"decode[32]", "mixed[64]"} <= set(early), "at start-up, before a request is wrong"
    monkeypatch.setattr(ProbeMaker, "_alike", lambda self, bucket: ())
    _, early = answers()
    assert "decode[32]" not in early, "without such a probe nobody would know"


def test_padding_costs_no_expert(tiny: TinyModels, device: str) -> None:
    """Whatever padding holds, it goes nowhere: a padded step gives what the step gives."""
    model = tiny("qwen3_moe", **MANY)
    prompts = [random_ids(seed, 5 + 7 * seed) for seed in range(3)]
    expected = generate(make_llm(model, device), prompts, greedy(12))
    llm = make_llm(
        model, device, graph_mode="full", **{**OPTIONS, "graph_buckets": "decode=32;mixed=64"}
    )
    assert generate(llm, prompts, greedy(12)) == expected
    assert llm.graph_report().replays > 5


@pytest.mark.parametrize(
    "cut", [5, 64, *(pytest.param(each, marks=pytest.mark.long) for each in (1, 2, 3, 63, 65, 70))]
)
def test_chunks_of_any_length(tiny: TinyModels, device: str, cut: int) -> None:
    model, prompt = tiny("qwen3_moe"), random_ids(4, 131)
    llm = make_llm(model, device, max_num_seqs=1, max_num_batched_tokens=cut)
    assert model.is_greedy(prompt, generate(llm, [prompt], greedy(8))[0])

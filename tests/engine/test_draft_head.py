"""An EAGLE-3 head drafts: the tokens are those without it, and it is as often right as offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_heads import EACH, of_few_words, oracle, write_head
from drafting import check_counters, rate
from helpers import TinyModel, TinyModels, copied_inputs, generate, greedy, make_llm, random_ids
from planted import OPTIONS, make_oracle, serve
from torch import Tensor

from reprise import LLM, SamplingParams
from reprise.engine.intake import draw_seed
from reprise.errors import ModelError
from reprise.loading.checkpoint import DEMO_MODEL
from reprise.loading.draft_head import DEMO_HEAD
from reprise.ops.sample.reference import reference as sample
from reprise.speculation import parse_speculation

PROMPTS = [random_ids(1, 30), random_ids(2, 41), random_ids(3, 9)]
HEADS: dict[str, dict[str, Any]] = {
    "qwen3": {"norm_before_residual": True, "draft_vocab": 150},
    "llama": {
        "form": "speculators", "first": "layers.0.", "norm_before_residual": True,
        "norm_output": True, "draft_vocab": 150, **EACH,
    },
}  # fmt: skip
"""For each of two targets one that is sometimes right."""


@pytest.fixture(scope="module", params=list(HEADS))
def pair(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyModel, Path]:
    root = tmp_path_factory.mktemp(request.param)
    model = of_few_words(tiny(request.param, num_hidden_layers=4), root / "model")
    return model, write_head(root / "head", model, imitates=True, **HEADS[request.param])


def drafting(
    model: TinyModel | Path, head: Path | None, device: str, k: int, **options: Any
) -> LLM:
    config = {"method": "eagle3", "num_speculative_tokens": k, **options.pop("draft", {})}
    if head is not None:
        config["model"] = str(head)
    return make_llm(model, device, speculative_config=config, **options)


Draw = Callable[[Tensor, Tensor], Tensor]
"""Logits [T, V] and the places in the text of what is drawn from them [T], to tokens [T]."""


def proposer(
    path: Path, reference: Any, k: int, draw: Draw | None = None
) -> Callable[[list[int]], list[int]]:
    """What the head drafts behind a text, by plain torch; None: the likeliest tokens."""
    plain = oracle()
    head, choose = plain.read_head(path, reference), draw or plain.greedy
    return lambda text: plain.draft(head, reference, text, k, choose)[-1].tolist()


ASKED = [
    greedy(24),
    SamplingParams(temperature=0.8, seed=5, max_tokens=24),
    SamplingParams(temperature=0.8, seed=5, max_tokens=24, top_k=20, top_p=0.9, logprobs=1),
]


@pytest.mark.parametrize(
    ("k", "graphs", "ahead"),
    [
        pytest.param(
            k, graphs, ahead, id=f"{graphs}, {k}{', ahead' * ahead}",
            marks=[pytest.mark.long] * (not usual),
        )
        for k, graphs, ahead, usual in (
            (1, "decode=full", False, False), (2, "breakable", True, False),
            (3, "decode=full", True, True), (4, "none", True, True), (5, "none", False, False),
        )
    ],
)  # fmt: skip
def test_tokens_are_those_without_drafts(
    pair: tuple[TinyModel, Path], device: str, monkeypatch: pytest.MonkeyPatch,
    k: int, graphs: str, ahead: bool,
) -> None:  # fmt: skip
    """With seeds too, one step ahead too."""
    plain = make_llm(pair[0], device)
    right = [generate(plain, PROMPTS, params) for params in ASKED]
    if ahead:
        copied_inputs(monkeypatch)
    llm = drafting(*pair, device, k, graph_mode=graphs, graph_buckets="decode=4;mixed=64")
    if ahead:
        llm.engine.pipeline.depth = 2
    assert [generate(llm, PROMPTS, params) for params in ASKED] == right
    assert 0.02 < rate(llm) < 0.95
    report = llm.graph_report()
    assert report.quarantined == []
    owners = {each.owner for each in report.graphs}
    assert owners == ({"", "draft prefill", "draft chain"} if graphs != "none" else set())


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("tokens", [pytest.param(64, marks=pytest.mark.long), 16])
def test_counters_are_those_of_the_head(
    pair: tuple[TinyModel, Path], device: str, k: int, tokens: int
) -> None:
    """Exactly those of an offline walk along the text, however its prompt was cut into chunks."""
    model, head = pair
    llm = drafting(model, head, device, k, max_num_batched_tokens=tokens, max_num_seqs=2)
    check_counters(llm, PROMPTS[:2], proposer(head, model.reference, k), accepted=5)


@pytest.mark.long
def test_chunks_hits_and_preemption(pair: tuple[TinyModel, Path], device: str) -> None:
    right = make_oracle(pair[0], device)()
    small = {**OPTIONS, "num_blocks": 24, "graph_mode": "none"}
    llm = drafting(*pair, device, 3, **small)
    assert serve(llm) == right
    assert llm.stats().scheduler.total_preemptions > 0
    assert llm.stats().scheduler.total_prefix_hits > 0
    assert rate(llm) > 0.02


@pytest.fixture(scope="module")
def demo() -> Any:
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model.eval().requires_grad_(False)


STORIES = ["Once upon a time", "There once was a robot", "Long ago there lived a queen"]


@pytest.mark.parametrize("k", [pytest.param(each, marks=[pytest.mark.long] * (each != 4))
                               for each in range(1, 6)])  # fmt: skip
def test_the_demo_models_head(demo: Any, device: str, k: int) -> None:
    """It counts what an offline walk counts, which is what it was trained for."""
    llm = drafting(DEMO_MODEL, None, device, k)
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(each, add_special_tokens=False) for each in STORIES]
    check_counters(llm, prompts, proposer(DEMO_HEAD, demo, k), accepted=60)
    assert llm.stats().drafts.acceptance_length > {1: 1.7, 2: 2.2, 3: 2.6, 4: 2.8, 5: 3.0}[k]


def test_drafts_are_drawn_as_the_request_draws(demo: Any, device: str) -> None:
    """With its temperature and its numbers, so that they count as often as the likeliest do."""
    params = SamplingParams(temperature=0.7, top_k=50, seed=7, max_tokens=200)
    llm = drafting(DEMO_MODEL, None, device, 4)
    prompt = llm.get_tokenizer().encode(STORIES[1], add_special_tokens=False)
    seed = draw_seed(params, engine_seed=0, ordinal=0, index=0)

    def draw(logits: Tensor, place: Tensor) -> Tensor:
        def filled(value: float, kind: torch.dtype) -> Tensor:
            return torch.full((len(logits),), value, dtype=kind)

        seeds = torch.full((len(logits),), seed)
        return sample(
            logits, filled(0.7, torch.float32), filled(50, torch.int32),
            filled(1, torch.float32), filled(0, torch.float32), seeds, place - len(prompt),
        )  # fmt: skip

    check_counters(llm, [prompt], proposer(DEMO_HEAD, demo, 4, draw), accepted=20, params=params)
    assert llm.stats().drafts.acceptance_length > 2.6


def test_only_the_demo_model_has_a_head(tiny: TinyModels, device: str) -> None:
    with pytest.raises(ModelError, match="method='eagle3' needs 'model'"):
        drafting(tiny("qwen3"), None, device, 3)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"model": "AngelSlim/Qwen3-8B_eagle3"}, "eagle3"),
        ({"model": "RedHatAI/Qwen3-8B-speculator.EAGLE3"}, "eagle3"),
        ({"model": "Qwen/Qwen3-0.6B"}, "draft_model"),
        ({"method": "draft_model", "model": "my-eagle3"}, "draft_model"),
        ({"method": "eagle3"}, "eagle3"),
    ],
)
def test_method_by_the_models_name(config: dict[str, Any], method: str) -> None:
    """As vLLM tells it, where nobody says it."""
    asked = parse_speculation({**config, "num_speculative_tokens": 3})
    assert asked is not None
    assert (asked.method, asked.model) == (method, config.get("model"))

"""What stands between a step and what drafts behind it: few launches, and faults that are seen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from draft_heads import of_few_words, write_head
from drafting import metrics
from helpers import TinyModel, TinyModels, greedy, make_llm, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from reprise import LLM, SamplingParams, ops
from reprise.graphs.segments import SegmentedGraph
from reprise.loading.checkpoint import DEMO_MODEL
from reprise.ops.step import ACCEPTED, NEXT
from reprise.step import Step

PROMPTS = [random_ids(number, 20) for number in range(3)]


class Launches(TorchDispatchMode):
    """Counts calls that give a device something to do."""

    VIEWS = frozenset(("slice", "select", "view", "as_strided", "unsqueeze", "unbind"))

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS and not (name == "zero_" and args[0].numel() == 0):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def target(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    root = tmp_path_factory.mktemp("target")
    return of_few_words(tiny("qwen3", num_hidden_layers=4), root / "model")


@pytest.fixture(scope="module")
def head(target: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("head")
    return write_head(root / "head", target, imitates=True, norm_before_residual=True)


@pytest.fixture
def drafting(target: TinyModel, head: Path, device: str) -> Callable[..., LLM]:
    def make(method: str, **options: Any) -> LLM:
        model = head if method == "eagle3" else target.path
        config = {"method": method, "model": str(model), "num_speculative_tokens": 3}
        return make_llm(target, device, speculative_config=config, **options)

    return make


@pytest.mark.parametrize(("method", "most"), [("draft_model", 1), ("eagle3", 2)])
def test_between_a_step_and_what_drafts_there_are_few_launches(
    drafting: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch,
    method: str, most: int,
) -> None:  # fmt: skip
    """Beside the graphs themselves and ``ops.draft_inputs``, which is bound to its arguments and
    comes by no dispatcher; one more where a block table has grown, for its copy."""
    if device == "sim":
        pytest.skip("its graphs are replayed in Python")
    llm = drafting(
        method, max_num_seqs=4, graph_mode="full", graph_buckets="decode=4;mixed=64",
        graph_verify="startup", block_size=8,
    )  # fmt: skip
    engine, runner = llm.engine, llm.engine.runner
    for number, prompt in enumerate(PROMPTS):
        engine.add(f"{number}", prompt, greedy(100))
    for _ in range(6):
        engine.step()
    monkeypatch.setattr(SegmentedGraph, "replay", lambda self: None)
    for _, owner in runner.owners:
        monkeypatch.setattr(owner.ledger, "_holds", lambda *asked: True)
    propose = runner.drafter.propose
    counts: dict[bool, list[list[str]]] = {False: [], True: []}

    def counted(step: Step, *others: Any) -> None:
        with Launches() as launches:
            propose(step, *others)
        counts[any(map(bool, step.edits))].append(launches.found)

    monkeypatch.setattr(runner.drafter, "propose", counted)
    for _ in range(24):
        engine.step()
    assert all(counts.values())
    for edited, found in counts.items():
        assert [each for each in found if len(each) > most + edited] == []
    engine.abort(["0", "1", "2"])
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_between_two_passes_of_a_chain_is_a_kernel_that_starts_in_order(
    drafting: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Attention may read keys before the kernel before has ended: those of the last pass too."""
    engine = drafting(method, graph_mode="none").engine
    propose, drawn = engine.runner.drafter.propose, 0

    def watched(step: Step, *others: Any) -> None:
        nonlocal drawn
        with Launches() as launches:
            propose(step, *others)
        found = launches.found
        draws = [number for number, each in enumerate(found) if each == "sample"]
        for draw in draws[:-1]:
            behind = found[draw + 1 :]
            assert {"clamp", "where"} & set(behind[: behind.index("paged_attention")])
        drawn += len(draws)

    monkeypatch.setattr(engine.runner.drafter, "propose", watched)
    engine.add("0", PROMPTS[0], greedy(12))
    while engine.has_work:
        engine.step()
    assert drawn > 3


# ---- faults of the glue ----------------------------------------------------------------------


def host_length(named: dict[str, Any]) -> None:
    """The last token that counts is taken from the host's count, which knows of no rejected one."""
    numbers, rows = named["integers"].clone(), named["step_rows"]
    numbers[ACCEPTED, rows[named["known"] == 0]] = 1 + 3
    named["integers"] = numbers


def stale_newest(named: dict[str, Any]) -> None:
    """The newest token is that of another step."""
    numbers = named["integers"].clone()
    numbers[NEXT, 1:] = 3
    named["integers"] = numbers


def chunk_tail(named: dict[str, Any]) -> None:
    """Behind a chunk stands some token, not the prompt's next one."""
    named["told"] = named["told"].clamp(max=7)


def short_lengths(named: dict[str, Any]) -> None:
    """The chain sees half of what is there."""
    named["then"] = lambda out: out["seq_lens"].div_(2, rounding_mode="floor")


def other_noise(named: dict[str, Any]) -> None:
    """Drafts are drawn with the number of another token."""
    named["then"] = lambda out: out["number"].add_(1)


FAULTS: list[tuple[Callable[[dict[str, Any]], None], str, float]] = [
    (host_length, "eagle3", 0.0),
    (chunk_tail, "eagle3", 0.0),
    (short_lengths, "eagle3", 0.0),
    (stale_newest, "eagle3", 0.0),
    (stale_newest, "draft_model", 0.0),
    (short_lengths, "draft_model", 0.0),
    (other_noise, "draft_model", 1.0),
]
TEXTS = ["Once upon a time there was a little dog who", "Tom and Lily went to the park. They"]
ASKED = {
    each: SamplingParams(temperature=each, seed=3, max_tokens=32, ignore_eos=True)
    for each in (0.0, 1.0)
}


@pytest.fixture(scope="module")
def demo(device: str) -> Callable[[str | None], LLM]:
    """The demo model with what drafts really well for it: its head, and itself."""

    @functools.cache
    def make(method: str | None) -> LLM:
        config: dict[str, Any] | None = None
        if method is not None:
            config = {"method": method, "num_speculative_tokens": 3}
            config |= {"model": str(DEMO_MODEL)} if method == "draft_model" else {}
        return LLM(
            str(DEMO_MODEL), device=device, dtype="float32", graph_mode="none", max_num_seqs=2,
            num_blocks=65, max_model_len=256, max_num_batched_tokens=16, speculative_config=config,
            enable_prefix_caching=False,
        )  # fmt: skip

    return make


def served(llm: LLM, temperature: float) -> tuple[list[list[int]], float]:
    """The tokens, and which share of the drafts counted."""
    before = metrics(llm)
    outputs = llm.generate(TEXTS, ASKED[temperature], use_tqdm=False)
    now = metrics(llm)
    accepted, drafted = (
        now.get(key, 0) - before.get(key, 0)
        for key in ("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens")
    )
    return [list(each.outputs[0].token_ids) for each in outputs], accepted / max(1, drafted)


@pytest.mark.parametrize(
    ("fault", "method", "temperature"),
    [
        pytest.param(
            *each, id=f"{each[0].__name__}, {each[1]}", marks=[pytest.mark.long] * (number > 3)
        )
        for number, each in enumerate(FAULTS)
    ],
)
def test_a_fault_costs_drafts_and_no_token(
    demo: Callable[[str | None], LLM], monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[dict[str, Any]], None], method: str, temperature: float,
) -> None:  # fmt: skip
    """What is counted tells, since the text does not."""
    llm = demo(method)
    right, _ = served(demo(None), temperature)
    tokens, sound = served(llm, temperature)
    assert tokens == right
    functions = llm.engine.runner.ops.functions
    original = functions["draft_inputs"]

    def broken(*given: Any) -> None:
        named = ops.draft_inputs.named(given, {})
        fault(named)
        then = named.pop("then", None)
        original(*named.values())
        if then is not None:
            then(named)

    monkeypatch.setitem(functions, "draft_inputs", broken)
    tokens, spoiled = served(llm, temperature)
    assert tokens == right
    assert spoiled < sound - 0.01

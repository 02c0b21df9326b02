"""DeepSeek-V4 through the engine against transformers: lengths, cuts, drafts, prefixes, executors.

transformers computes a prompt at once and without a cache. Everything here computes it in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from head_steps import HeadSteps
from helpers import (
    TinyModel,
    TinyModels,
    assert_idle,
    generate,
    greedy,
    make_llm,
    random_ids,
    recorded_logits,
)
from next_streams import NextLayer

from reprise import LLM, models
from reprise.errors import ModelError
from reprise.layers import Build
from reprise.loading import open_checkpoint
from reprise.loading.weights import load_weights
from reprise.platforms import Platform

IDS = random_ids(1, 300)
EXACT = 2e-5
"""Of logits whose standard deviation is 1, in float32."""
LENGTHS = (3, 4, 5, 15, 16, 17, 19, 20, 21, 127, 128, 129, 255, 256, 257, 299)
NGRAM = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
RATIOS = {
    "as released": {},
    "compressed from the start": {"compress_ratios": [128, 128, 4, 128, 4, 0]},
    "by 4 alone": {"compress_ratios": [4, 4, 0], "num_hidden_layers": 3, "num_hash_layers": 0},
    "by 128 alone": {"compress_ratios": [128, 128], "num_hidden_layers": 2},
    "windows alone": {"compress_ratios": [0, 0], "num_hidden_layers": 2},
}


@pytest.fixture
def exact(device: str) -> float:
    return EXACT if device in ("cpu", "sim") else 10 * EXACT


@pytest.fixture
def model(tiny: TinyModels) -> TinyModel:
    return tiny("deepseek_v4")


def difference(
    llm: LLM, model: TinyModel, prompts: Sequence[Sequence[int]], tokens: int = 1
) -> float:
    """The largest one of logits between ours and transformers', of so many draws a prompt."""
    with recorded_logits(llm) as seen:
        outputs = generate(llm, [list(each) for each in prompts], greedy(tokens))
    worst = 0.0
    for name, prompt, output in zip(sorted(seen, key=int), prompts, outputs, strict=True):
        expected = model.logits([*prompt, *output])[len(prompt) - 1 : -1]
        found = torch.stack(seen[name])[: len(output)]
        worst = max(worst, float((found - expected).abs().max()))
    return worst


def test_prompts_of_every_length(model: TinyModel, device: str, exact: float) -> None:
    """Also side by side: none sees another's rows."""
    llm = make_llm(model, device, enable_prefix_caching=False)
    prompts = [IDS[:length] for length in LENGTHS]
    assert difference(llm, model, prompts) < exact


@pytest.mark.parametrize(
    "chunk", [131, 7, *(pytest.param(each, marks=pytest.mark.long) for each in (1, 4, 5, 6, 128))]
)
def test_prompts_cut_anywhere(model: TinyModel, device: str, exact: float, chunk: int) -> None:
    """Between them the chunks end at every residue of a position by 4, and around 128."""
    llm = make_llm(model, device, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 2))
    assert difference(llm, model, [IDS[:261]]) < exact


def test_two_requests_decode_across_rows_of_128(
    model: TinyModel, device: str, exact: float
) -> None:
    llm = make_llm(model, device)
    assert difference(llm, model, [IDS[:120], IDS[100:109]], tokens=20) < exact


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.long) for each in RATIOS if RATIOS[each]]
)
def test_other_patterns_of_layers(tiny: TinyModels, device: str, exact: float, name: str) -> None:
    other = tiny("deepseek_v4", **RATIOS[name])
    llm = make_llm(other, device)
    assert difference(llm, other, [IDS[:200], IDS[:126]], tokens=5) < exact


@pytest.mark.parametrize("drafts", [3, pytest.param(7, marks=pytest.mark.long)])
def test_drafts_that_count_and_that_do_not(
    model: TinyModel, device: str, exact: float, drafts: int
) -> None:
    """A text that repeats itself, then does not, across rows of 4 and of 128."""
    llm = make_llm(model, device, speculative_config={**NGRAM, "num_speculative_tokens": drafts})
    prompts = [[*IDS[:5] * 24, 3], [7, 7, 7]]
    plain = make_llm(model, device)
    expected = generate(plain, prompts, greedy(24))
    assert generate(llm, prompts, greedy(24)) == expected
    for prompt, output in zip(prompts, expected, strict=True):
        assert model.is_greedy(prompt, output)
    assert llm.stats().drafts.drafted > 0


def test_a_prefix_is_found_at_every_block(model: TinyModel, device: str, exact: float) -> None:
    """With all that goes on from there: the window, the rows, what the next rows are made of."""
    llm = make_llm(model, device)
    generate(llm, [IDS[:290]], greedy(1))
    for shared in (128, 256, 290):
        prompt = [*IDS[:shared], *random_ids(shared, 9)]
        with recorded_logits(llm) as seen:
            [output] = llm.generate([prompt], greedy(1), use_tqdm=False)
        assert output.metrics.num_cached_tokens == shared // 128 * 128
        found, expected = torch.stack(next(iter(seen.values())))[0], model.logits(prompt)[-1]
        assert float((found - expected).abs().max()) < exact
    assert_idle(llm)


def test_what_is_computed_again_is_the_same(model: TinyModel, device: str) -> None:
    llm = make_llm(model, device)
    prompts = [IDS[:130], IDS[50:60], IDS[:7]]
    expected = generate(llm, prompts, greedy(12))
    engine = llm.engine
    groups = [engine.add(f"{n}", prompt, greedy(12)) for n, prompt in enumerate(prompts)]
    for number in range(1000):
        if not engine.has_work:
            break
        if number % 4 == 3:
            engine.scheduler.recompute()
        engine.step()
    outputs = [each.output() for each in groups]
    assert [list(each.outputs[0].token_ids) for each in outputs] == expected
    assert sum(each.metrics.num_preemptions for each in outputs) > 0


@pytest.mark.parametrize(
    "executor", ["breakable", "full", pytest.param("compiled", marks=pytest.mark.long)]
)
def test_every_executor(model: TinyModel, device: str, exact: float, executor: str) -> None:
    llm = make_llm(
        model, device, graph_mode=executor, graph_buckets="decode=2;mixed=64", max_num_seqs=2
    )
    assert difference(llm, model, [IDS[:61], IDS[60:64]], tokens=8) < exact
    assert not llm.graph_report().quarantined


def test_the_layer_that_drafts_is_transformers(
    tiny: TinyModels, platform: Platform, tmp_path: Path
) -> None:
    """Over a prompt in two chunks, longer than its window."""
    oracle = NextLayer(tiny, tmp_path / "model")
    text = random_ids(9, 50)
    given, made, logits = oracle(text)
    build = Build(torch.float32, platform.device, 256)
    config = open_checkpoint(str(oracle.model.path)).config
    with torch.inference_mode():
        target = models.build(config, build)
        load_weights(target, oracle.model.path, "auto", platform)
        head = models.build_mtp(config, build, target)
        load_weights(head, oracle.model.path, "auto", platform)
    steps, begin = HeadSteps(head, platform, len(text)), 0
    for end in (21, len(text) - 1):
        found, drawn = steps(begin, text[1 + begin : 1 + end], given[begin:end])
        assert float((found - made[begin:end]).abs().max()) < 1e-4
        assert float((drawn - logits[begin:end]).abs().max()) < 1e-4
        begin = end


def test_its_drafts_change_no_token(tiny: TinyModels, device: str, tmp_path: Path) -> None:
    model = NextLayer(tiny, tmp_path / "model").model
    mtp = {"method": "mtp", "num_speculative_tokens": 3}
    llm = make_llm(model, device, speculative_config=mtp)
    prompts = [random_ids(9, 70), random_ids(10, 5)]
    assert generate(llm, prompts, greedy(12)) == generate(
        make_llm(model, device), prompts, greedy(12)
    )
    assert llm.stats().drafts.drafted > 0


@pytest.mark.parametrize(("fields", "named"), [({"dspark_block_size": 5}, "DSpark")])
def test_drafters_of_relatives_are_refused_by_name(
    tiny: TinyModels, device: str, fields: dict[str, Any], named: str
) -> None:
    other = tiny("deepseek_v4", **RATIOS["windows alone"], **fields)
    with pytest.raises(ModelError, match=named):
        make_llm(other, device, speculative_config={"method": "mtp", "num_speculative_tokens": 1})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"n_shared_experts": 2}, "n_shared_experts=2"),
        ({"swiglu_limit": 0.0}, "swiglu_limit=0.0"),
        ({"o_groups": 3}, "o_groups=3"),
        ({"hc_mult": 0}, "hc_mult=0"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    model: TinyModel, device: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named.replace("(", "\\(")):
        make_llm(model, device, hf_overrides=fields)

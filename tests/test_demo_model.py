"""The bundled model is good for something: it knows what it was not taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantized import EIGHT_BITS, FOUR_BITS, tool

from reprise import LLM, SamplingParams
from reprise.loading.checkpoint import DEMO_MODEL

SUMS = 500
SHORT = ("fp8", "gptq")


def share_of_right_sums(llm: LLM) -> float:
    """Of held-out additions, all in one batch."""
    pairs = json.loads((DEMO_MODEL / "held_out_additions.json").read_text())["pairs"][:SUMS]
    assert len(pairs) == SUMS
    outputs = llm.generate(
        [f"{a} + {b} =" for a, b in pairs],
        SamplingParams(temperature=0, max_tokens=6),
        use_tqdm=False,
    )
    found = [each.outputs[0].text.split() for each in outputs]
    right = sum(text[:1] == [str(a + b)] for text, (a, b) in zip(found, pairs, strict=True))
    assert llm.stats().scheduler.total_preemptions == 0
    return right / SUMS


def test_held_out_additions_in_one_batch(device: str) -> None:
    assert share_of_right_sums(LLM(device=device, max_num_seqs=SUMS)) >= 0.99


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(each, marks=[] if each in SHORT else [pytest.mark.long])
        for each in (*EIGHT_BITS, *FOUR_BITS)
    ],
)
def test_in_fewer_bits(device: str, tmp_path: Path, method: str) -> None:
    """Rounded to nearest; where groups must be whole, they are of 32 inputs, since 128 do not
    divide the model's 416."""
    group = 32 if tool().METHODS[method].grouped else 128
    tool().quantize(DEMO_MODEL, tmp_path / "model", method, group)
    llm = LLM(str(tmp_path / "model"), device=device, max_num_seqs=SUMS)
    assert share_of_right_sums(llm) >= (0.99 if method in EIGHT_BITS else 0.97)

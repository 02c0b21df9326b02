"""The bundled model is good for something: it knows what it was not taught."""

from __future__ import annotations

import json

from reprise import LLM, SamplingParams
from reprise.loading.checkpoint import DEMO_MODEL

SUMS = 500


def test_held_out_additions_in_one_batch(device: str) -> None:
    pairs = json.loads((DEMO_MODEL / "held_out_additions.json").read_text())["pairs"][:SUMS]
    assert len(pairs) == SUMS
    llm = LLM(device=device, max_num_seqs=SUMS)
    outputs = llm.generate(
        [f"{a} + {b} =" for a, b in pairs],
        SamplingParams(temperature=0, max_tokens=6),
        use_tqdm=False,
    )
    found = [each.outputs[0].text.split() for each in outputs]
    right = sum(text[:1] == [str(a + b)] for text, (a, b) in zip(found, pairs, strict=True))
    assert right >= 0.99 * SUMS, right
    assert llm.stats().scheduler.total_preemptions == 0

"""Each format against transformers on the weights that the stored ones stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids, recorded_logits
from quantized import EIGHT_BITS, FOUR_BITS, quantized

from reprise.ops import all_ops

PROMPTS = [random_ids(1, 1), random_ids(2, 60), random_ids(3, 17)]
STEPS = 12
WIDE: dict[str, Any] = {"intermediate_size": 256, "head_dim": 64}
"""More than one whole block each way."""
ODD: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 200, "head_dim": 20}
"""Blocks, groups and words are cut off, and parts end within blocks."""
EXACT = {name: "reference" for name in all_ops() if name.startswith("fp8_")}
ODD_GROUP = {"gptq": 48, "gptq-asymmetric": 48}
CASES = [
    *(("llama", method, WIDE, 128) for method in EIGHT_BITS),
    *(("qwen3", method, {}, 32) for method in FOUR_BITS),
    *(("llama", method, ODD, ODD_GROUP.get(method, 8)) for method in (*EIGHT_BITS, *FOUR_BITS)),
    *(
        ("qwen2", method, {"tie_word_embeddings": True}, 32)  # biases, a tied head
        for method in ("fp8", "fp8-channel", "int4-asymmetric", "awq", "gptq")
    ),
    ("qwen3_moe", "gptq", {}, 32),
    ("qwen2_moe", "awq", {}, 16),
    ("qwen3_5", "int4-asymmetric", {}, 16),  # products with fewer outputs than a word has
    ("qwen3_5", "fp8-block", {}, 128),
]


@pytest.mark.parametrize(
    ("architecture", "method", "fields", "group"),
    [pytest.param(*case, id=f"{case[0]}, {case[1]}, {len(case[2])} fields") for case in CASES],
)
def test_logits_are_those_of_the_plain_model(
    tiny: TinyModels, device: str, own_kernels: bool, architecture: str, method: str,
    fields: dict[str, Any], group: int, tolerance: float,
) -> None:  # fmt: skip
    """With activations that a plain torch model quantises alike, where the format does.

    Sums in another order may put an activation on the other side of where eight bits are rounded:
    one number is its neighbour then, and that token and later ones differ by more. That happens to
    few; what is quantised otherwise differs everywhere.
    """
    model = quantized(tiny(architecture, **fields), method, group)
    # A device's units add products of eight bits with fewer bits than float32 has, which moves an
    # activation in every token. These kernels are compared op by op.
    exact = EXACT if own_kernels and method in EIGHT_BITS else {}
    llm = make_llm(model, device, ops=exact)
    with recorded_logits(llm) as seen:
        outputs = generate(llm, PROMPTS, greedy(STEPS))
    differences = []
    for name, prompt, output in zip(seen, PROMPTS, outputs, strict=True):
        expected = model.logits([*prompt, *output])[len(prompt) - 1 : -1]
        difference = (torch.stack(seen[name][:STEPS]) - expected).abs().amax(dim=1)
        # Of logits around ten; those of wide random models are larger.
        differences.append(difference / max(1.0, float(expected.abs().max()) / 10))
    found = torch.cat(differences)
    if method in FOUR_BITS:
        assert float(found.max()) < tolerance
    else:
        assert float((found < 10 * tolerance).float().mean()) > 0.75
        assert float(found.max()) < 0.5

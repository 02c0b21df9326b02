"""Hidden states that a forward pass hands out, against those of transformers."""

from __future__ import annotations

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids

from reprise.runner import parts
from reprise.shape import StepShape

FAMILIES = ("qwen3", "llama", "qwen2", "mistral", "qwen3_moe", "qwen3_5")
PROMPT = random_ids(4, 21)
TOKENS = 4


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((each, {"graph_mode": "none"}) for each in FAMILIES),
        ("qwen3", {"graph_mode": "decode=full", "graph_buckets": "decode=1,4"}),
        ("qwen3", {"graph_mode": "breakable", "graph_buckets": "decode=4;mixed=32"}),
        pytest.param(
            "llama", {"graph_mode": "compiled", "graph_buckets": "decode=2;mixed=32"},
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else each["graph_mode"],
)  # fmt: skip
def test_residual_stream_at_any_depth(
    tiny: TinyModels, device: str, platform, monkeypatch, architecture: str, options: dict[str, str]
) -> None:
    """Of a prompt and of a token that is decoded behind it, whatever runs them."""
    if options["graph_mode"] == "compiled" and platform.compiler_missing() is not None:
        pytest.skip(platform.compiler_missing())
    model = tiny(architecture)
    layers = model.reference.config.get_text_config().num_hidden_layers
    depths = (0, 1, layers, "final")
    made = parts.ForwardPass
    monkeypatch.setattr(
        parts,
        "ForwardPass",
        lambda *given, **named: made(*given, **named | {"taps": depths}),
    )
    llm = make_llm(model, device, **options)
    forward_pass = llm.engine.runner.forward_pass

    def taps(shape: StepShape) -> list[torch.Tensor]:
        return list(forward_pass.taps(shape).float().cpu().clone().chunk(len(depths), 1))

    (first,) = generate(llm, [PROMPT], greedy(1))
    of_prompt = taps(StepShape.mixed(len(PROMPT), 1))
    (tokens,) = generate(llm, [PROMPT], greedy(TOKENS))
    of_last = taps(StepShape.decode(1))
    assert llm.graph_report().quarantined == []
    assert first == tokens[:1]

    text = torch.tensor([[*PROMPT, *tokens[:-1]]])
    with torch.no_grad():
        states = model.reference(text, output_hidden_states=True).hidden_states
    norm = model.reference.get_decoder().norm
    for found, rows in ((of_prompt, slice(0, len(PROMPT))), (of_last, slice(-1, None))):
        for depth, each in zip(depths, found, strict=True):
            right = states[-1 if depth == "final" else depth][0, rows]
            # transformers gives the last layer's states behind the norm.
            got = norm(each) if depth == layers else each
            torch.testing.assert_close(got, right, rtol=2e-4, atol=2e-4)

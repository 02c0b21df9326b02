"""Each architecture against its transformers class: logits and greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HYBRIDS, TinyModels, generate, greedy, make_llm, random_ids, recorded_logits
from transformers import AutoConfig

from reprise.errors import ModelError
from reprise.layers import Build, SparseMLP
from reprise.models import build

STEPS = 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}
WINDOW_ABOVE = {
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 13,
    "max_window_layers": 1,
}

BOTH: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "gqa 1": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "gqa 2, untied": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gqa 4, tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gqa 8": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "odd group": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 64},
    "rope llama3": {"rope_parameters": LLAMA3},
    "rope yarn": {"rope_parameters": YARN},
    "rope linear": {"rope_parameters": LINEAR},
    "attention bias": {"attention_bias": True},
    "eps": {"rms_norm_eps": 0.1},
}
CASES = [
    *((kind, name, fields) for name, fields in BOTH.items() for kind in ("qwen3", "llama")),
    ("llama", "mlp bias", {"mlp_bias": True, "attention_bias": True}),
    ("llama", "head_dim from hidden", {"head_dim": None}),
    ("qwen3", "sliding window in the upper layers", WINDOW_ABOVE),
    (
        "qwen3",
        "sliding window everywhere",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    ("qwen3", "sliding window off", {"use_sliding_window": False, "sliding_window": 8}),
    ("qwen2", "grouped", {**GROUPED, "head_dim": None}),
    ("qwen2", "tied, yarn", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ("qwen2", "sliding window in the upper layers", WINDOW_ABOVE),
    ("qwen2", "sliding window off", {"use_sliding_window": False, "sliding_window": 8}),
    ("mistral", "sliding window", {"sliding_window": 13}),
    ("mistral", "no window", {**GROUPED, "sliding_window": None}),
    ("mistral", "wide heads", {"sliding_window": 50, "head_dim": 64, "tie_word_embeddings": True}),
    ("smollm3", "by the interval", {**GROUPED, "num_hidden_layers": 5}),
    ("smollm3", "every second layer", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    ("smollm3", "by the list", {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0]}),
    ("smollm3", "all rotate", {"no_rope_layers": [1, 1], "tie_word_embeddings": True}),
    ("smollm3", "biases", {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0]}),
    (
        "smollm3",
        "window where nothing rotates",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 13},
    ),
    ("qwen3_next", "experts and a dense layer", {"seed": 1}),
    (
        "qwen3_next",
        "dense, every third layer full",
        {
            "num_experts": 0,
            "full_attention_interval": 3,
            "linear_num_value_heads": 2,
        },
    ),
    ("qwen3_5", "tied", {}),
    ("qwen3_5_moe", "experts", {}),
    ("qwen3_5_vl", "text part", {}),
    ("qwen3_5_moe_vl", "text part", {}),
    ("qwen3_moe", "all sparse", {}),
    ("qwen3_moe", "weights as they are", {"norm_topk_prob": False, "num_experts_per_tok": 2}),
    ("qwen3_moe", "a dense layer", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    ("qwen3_moe", "every second layer", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    ("qwen3_moe", "every expert", {"num_experts_per_tok": 8, "tie_word_embeddings": True}),
    ("qwen3_moe", "one expert a row", {"num_experts_per_tok": 1, "attention_bias": True}),
    ("qwen3_moe", "odd sizes", {"num_experts": 5, "moe_intermediate_size": 20}),
    ("qwen3_moe", "no experts", {"num_experts": 0}),
    ("qwen3_moe", "sliding window", {"use_sliding_window": True, "sliding_window": 13}),
    ("qwen2_moe", "a shared expert", {}),
    ("qwen2_moe", "renormalised", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    ("mixtral", "all sparse", {}),
    ("mixtral", "sliding window", {"sliding_window": 13, "num_experts_per_tok": 3}),
]
LONG = [
    *((("llama", "qwen3")[number % 2], name) for number, name in enumerate(BOTH)),
    ("qwen3_moe", "weights as they are"),
    ("qwen3_moe", "every second layer"),
    ("qwen3_moe", "every expert"),
    ("qwen3_moe", "no experts"),
    ("qwen3_moe", "sliding window"),
    ("qwen2_moe", "renormalised"),
    ("mixtral", "sliding window"),
]
"""Left out of short runs: what they have others have, apart."""


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        pytest.param(
            kind,
            fields,
            id=f"{kind}: {name}",
            marks=[pytest.mark.long] if (kind, name) in LONG else [],
        )
        for kind, name, fields in CASES
    ],
)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    tiny: TinyModels, device: str, tolerance: float, architecture: str, fields: dict[str, Any]
) -> None:
    model = tiny(architecture, **fields)
    llm = make_llm(model, device)
    assert torch.get_float32_matmul_precision() == "highest", "no tf32"
    prompts = [random_ids(1, 1), random_ids(2, 100), random_ids(3, 17)]
    with recorded_logits(llm) as seen:
        outputs = generate(llm, prompts, greedy(STEPS))
    # In the order of submission, not of first tokens.
    for name, prompt, output in zip(sorted(seen, key=int), prompts, outputs, strict=True):
        expected, exact = (
            of([*prompt, *output])[len(prompt) - 1 : -1]
            for of in (model.logits, model.exact_logits)
        )
        found = torch.stack(seen[name][:STEPS])
        # transformers' chunked rule loses some bits of strong decays.
        allowed = 2 * tolerance if architecture in HYBRIDS else tolerance
        # Other kernels sum in another order than transformers, whose own rounding is no measure.
        rounding = float((expected - exact).abs().max())
        assert float((found - exact).abs().max()) < allowed + rounding
        assert len(output) == STEPS
        assert model.is_greedy(prompt, output)


@pytest.mark.parametrize(
    "architecture", ["qwen3", "qwen2", "llama", "mistral", "smollm3", "qwen3_moe"]
)
def test_the_tests_models_are_worth_testing_with(tiny: TinyModels, architecture: str) -> None:
    """Their greedy output varies, and depends on distant tokens and on their order."""
    model = tiny(architecture)
    prompt = random_ids(2, 100)
    logits = model.logits(prompt)
    assert len(set(logits.argmax(dim=-1).tolist())) > 30
    for changed in ([prompt[0] ^ 1, *prompt[1:]], [prompt[1], prompt[0], *prompt[2:]]):
        assert float((model.logits(changed)[-1] - logits[-1]).abs().max()) > 1e-3


HALF_ROTATED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("architecture", "overrides", "named"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional'"),
        ("llama", {"rope_parameters": HALF_ROTATED}, "partial_rotary_factor=0.5"),
        ("qwen3", {"rope_parameters": HALF_ROTATED}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_an_architecture_does_not_compute_is_refused(
    tiny: TinyModels, device: str, architecture: str, overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match="not supported") as caught:
        make_llm(tiny(architecture), device, hf_overrides=overrides)
    assert named in str(caught.value)
    assert "supported: " in str(caught.value)


SLIDING = ["sliding_attention"] * 2
BY_LAYER = {"full_attention": LINEAR, "sliding_attention": LINEAR}


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention'"),
        ("qwen3", {"layer_types": SLIDING, "sliding_window": None}, "sliding_window=None"),
        ("qwen2", {"layer_types": SLIDING, "sliding_window": 0}, "sliding_window=0"),
        ("qwen2", {"layer_types": SLIDING * 2, "sliding_window": 8}, "num_hidden_layers=2"),
        ("qwen3", {"layer_types": None}, "layer_types=None"),
        ("qwen3", {"rope_parameters": BY_LAYER}, "full_attention, sliding_attention"),
        ("mistral", {"layer_types": SLIDING}, "layer_types=['sliding_attention'"),
        *(
            (
                each,
                {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
                "layer_types=['full_attention', 'sliding_attention'] is not followed",
            )
            for each in ("llama", "mixtral", "qwen3_moe")
        ),
        ("mixtral", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "layer_types="),
        *(
            (
                each,
                {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8}},
                "of 64 tokens; give a smaller max_model_len",
            )
            for each in ("qwen2", "qwen3_moe")
        ),
        ("qwen2", {"dual_chunk_attention_config": [64]}, "dual_chunk_attention_config=[64]"),
        ("qwen3_next", {"dual_chunk_attention_config": [64]}, "dual_chunk_attention_config=[64]"),
        *(
            (each, {"sliding_window": 63}, "sliding_window=63 is not followed")
            for each in ("llama", "qwen3_5")
        ),
        *(
            (each, {"attention_chunk_size": 8}, "attention_chunk_size=8 is not followed")
            for each in ("llama", "qwen3", "mixtral", "qwen3_next")
        ),
        ("deepseek_v4", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("mistral", {"sliding_window": True}, "sliding_window=True"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=[1]"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers=[1, 2]"),
        ("smollm3", {"no_rope_layers": None}, "no_rope_layers=None"),
        ("smollm3", {"mlp_bias": "yes"}, "mlp_bias='yes'"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        *(
            (each, {"is_causal": False}, "is_causal=False")
            for each in ("llama", "qwen3", "mixtral", "qwen3_next")
        ),
    ],
)
def test_fields_that_an_architecture_cannot_read_are_refused(
    tiny: TinyModels, device: str, architecture: str, changes: dict[str, Any], named: str
) -> None:
    config = AutoConfig.from_pretrained(tiny(architecture).path)
    # Past the checks of newer transformers: older ones have none.
    vars(config).update(changes)
    with pytest.raises(ModelError) as caught:
        build(config, Build(torch.float32, torch.device(device), 64))
    assert named in str(caught.value)


def test_what_another_family_s_config_says_of_experts_changes_nothing(
    tiny: TinyModels, device: str
) -> None:
    """All layers of Qwen3.5's mixtures have experts, whatever was left in a file."""
    config = AutoConfig.from_pretrained(tiny("qwen3_5_moe").path)
    vars(config).update(decoder_sparse_step=2, mlp_only_layers=[0])
    model = build(config, Build(torch.float32, torch.device("meta"), 64))
    assert sum(isinstance(each, SparseMLP) for each in model.modules()) == model.num_layers


def test_what_changes_nothing_is_not_refused(tiny: TinyModels, device: str) -> None:
    """Chunks that no context of this engine fills, and layers of the kinds that are computed."""
    unused = {"use_sliding_window": False, "sliding_window": 8}
    for architecture, windows, kind in (
        ("llama", {"sliding_window": 64, "attention_chunk_size": 64}, "full_attention"),
        ("llama", unused, "full_attention"),
        ("mixtral", {"sliding_window": 8}, "sliding_attention"),
    ):
        config = AutoConfig.from_pretrained(tiny(architecture).path)
        chunks = {"chunk_size": 72, "local_size": 8, "original_max_position_embeddings": 72}
        vars(config).update(layer_types=[kind] * 2, dual_chunk_attention_config=chunks, **windows)
        assert build(config, Build(torch.float32, torch.device(device), 64)).num_layers == 2

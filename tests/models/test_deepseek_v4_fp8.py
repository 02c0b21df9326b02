"""DeepSeek-V4's caches in eight bits: what they hold, what that does to logits, what they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TinyModel,
    TinyModels,
    config_class,
    generate,
    greedy,
    make_llm,
    random_ids,
    recorded_logits,
)
from torch import Tensor

from reprise.cache import LayerCache, Rows
from reprise.platforms import Platform

FP8 = {"kv_cache_dtype": "fp8"}
IDS = random_ids(1, 300)
DRAFTS = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1,
          "num_speculative_tokens": 3}  # fmt: skip


@pytest.fixture
def model(tiny: TinyModels, platform: Platform) -> TinyModel:
    if platform.fp8_dtype is not torch.float8_e4m3fn:
        pytest.skip("the device has no e4m3")
    return tiny("deepseek_v4")


def rounded(x: Tensor, group: int) -> Tensor:
    """As DeepSeek's code rounds a row's channels for training, by logarithms of exact numbers."""
    parts = x.double().unflatten(-1, (-1, group))
    most = parts.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(most / 448)))
    codes = (parts / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return (codes.double() * scale).flatten(-2).to(x.dtype)


def round_caches(reference: Any) -> list[Any]:
    """Has a transformers model round what it caches; returns what takes that back. Channels that do
    not rotate are what the norm before the rotation gives."""
    config = reference.config
    plain = config.head_dim - config.qk_rope_head_dim

    def row(_: Any, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat((rounded(output[..., :plain], 8), output[..., plain:]), dim=-1)

    def keys(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, found, *rest = inputs
        return query, rounded(found, found.shape[-1]), *rest

    hooks = []
    for name, each in reference.named_modules():
        if name.endswith(".kv_norm") and ".indexer." not in name:
            hooks.append(each.register_forward_hook(row))
        if name.endswith(".indexer.scorer"):
            hooks.append(each.register_forward_pre_hook(keys))
    assert len(hooks) == config.num_hidden_layers + 4 + 2
    return hooks


def test_logits_are_those_of_a_model_that_rounds_as_in_training(
    model: TinyModel, device: str
) -> None:
    """A number in the middle between two codes may fall to another one, and a choice of the
    indexer with it: so the median is held to a bound, and the largest to less than what rounding
    makes."""
    reference = model.reference
    exact = model.logits(IDS)
    hooks = round_caches(reference)
    try:
        expected = model.logits(IDS)
    finally:
        for each in hooks:
            each.remove()
    llm = make_llm(model, device, **FP8, enable_prefix_caching=False, max_num_batched_tokens=77)
    lengths = [9, 21, 40, 77, 128, 129, 130, 200, 256, 300]
    with recorded_logits(llm) as seen:
        generate(llm, [IDS[:length] for length in lengths], greedy(1))
    found = torch.stack([seen[name][0] for name in sorted(seen, key=int)])
    last = torch.tensor(lengths) - 1
    ours = (found - expected[last]).abs().amax(dim=1)
    effect = (exact[last] - expected[last]).abs().amax(dim=1)
    assert float(ours.median()) < 2e-5
    assert float(ours.max()) < float(effect.median())


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 2},
        pytest.param(
            {"graph_mode": "full", "graph_buckets": "decode=2;mixed=64", "max_num_seqs": 2},
            marks=pytest.mark.long,
        ),
        pytest.param({"graph_mode": "breakable"}, marks=pytest.mark.long),
        pytest.param({"speculative_config": DRAFTS}, marks=pytest.mark.long),
    ],
)
def test_tokens_do_not_depend_on_how_they_are_computed(
    model: TinyModel, device: str, options: dict[str, Any]
) -> None:
    """Cut, in graphs, drafted, and behind a prefix, each of which reads codes."""
    prompts = [[*IDS[:5] * 27, 3], IDS[:9]]
    expected = generate(make_llm(model, device, **FP8), prompts, greedy(12))
    llm = make_llm(model, device, **FP8, **options)
    for _ in range(2):
        assert generate(llm, prompts, greedy(12)) == expected
    assert not llm.graph_report().quarantined


FLASH: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43,
    "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512,
    "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024,
    "sliding_window": 128, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 256,
    "num_experts_per_tok": 6, "n_shared_experts": 1, "moe_intermediate_size": 2048,
    "num_hash_layers": 3, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0, "hc_mult": 4, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536},
    "max_position_embeddings": 1 << 20, "tie_word_embeddings": False, "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    },
    "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"],
}  # fmt: skip
"""As released."""


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``flash(cache_dtype)``: the released Flash in bfloat16, of sizes alone."""
    from reprise import models
    from reprise.layers import Build
    from reprise.loading import open_checkpoint

    config_class("DeepseekV4Config")  # skipped where it is not known
    path = tmp_path_factory.mktemp("flash")
    (path / "config.json").write_text(json.dumps(FLASH))
    config = open_checkpoint(str(path), config_only=True).config

    def make(cache_dtype: torch.dtype | None = None) -> Any:
        build = Build(torch.bfloat16, torch.device("meta"), 1, cache_dtype=cache_dtype)
        return models.build(config, build)

    return make


def test_flash_is_as_large_as_its_tensors(flash: Callable[..., Any]) -> None:
    """By the shapes of the release: nothing is stored wider, or twice, but the scales of blocks,
    which are float32 here."""
    model = flash()
    held = sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    h, layers = 4096, 43
    blocks = [(1536, h), (32768, 1024), (8192, h), (h, 8192), (2 * 2048, h), (h, 2048)]
    attention = layers * sum(n * k for n, k in blocks) + 21 * 8192 * 1024
    scales = attention // (128 * 128)
    experts = layers * 256 * 3 * 2048 * h
    plain = 2 * 129280 * h + layers * 256 * h
    plain += 21 * (2 * 1024 + 2 * 256 + 64) * h + 20 * 2 * 512 * h
    wide = layers * 2 * (24 * 4 * h + 24 + 3) + 4 * 4 * h + 4 + 1
    wide += layers * (2 * h + 1024 + 512 + 64) + h + 40 * 256
    wide += 21 * (4 * 1024 + 512 + 4 * 256 + 128) + 20 * (128 * 512 + 512)
    tables = 3 * 129280 * 6 * 8
    expected = attention + 4 * scales + experts // 2 + experts // 32 + 2 * plain + 4 * wide + tables
    assert held == expected
    assert held / 2**30 == pytest.approx(145.30, abs=0.02)


def kept_bytes(caches: dict[str, LayerCache]) -> float:
    return sum(each.token_bytes for each in caches.values() if not each.lifetime.bounded)


def test_flash_takes_what_the_release_takes(flash: Callable[..., Any]) -> None:
    """Of a token's rows 448 codes, 64 numbers and scales, of keys 128 codes and a scale."""
    assert kept_bytes(flash().caches()) == 6880
    codes = flash(torch.float8_e4m3fn).caches()
    assert kept_bytes(codes) == 21 * (448 + 128 + 28 + 128 + 4) / 4 + 20 * (448 + 128 + 28) / 128
    assert kept_bytes(codes) < 1.05 * 3850
    window = codes["layer 0 window"]
    assert window.rows["kv"] == Rows((7, 64), torch.float8_e4m3fn)
    assert window.token_bytes == 448 + 128 + 28


@pytest.mark.long
def test_doctor_plans_a_million_tokens(tmp_path: Path) -> None:
    from reprise.config import EngineConfig
    from reprise.doctor.memory import memory_report

    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    config = EngineConfig(
        model=str(tmp_path), dtype="bfloat16", device="cpu", kv_cache_memory_bytes=9 << 30,
        max_num_seqs=2, **FP8,
    )  # fmt: skip
    report = memory_report(config, 640 << 30)
    longest = max(report.capacities, key=lambda each: each.tokens)
    assert (longest.tokens, longest.requests) == (1 << 20, 2)
    fixed = sum(each.request_bytes for each in report.caches if "window" in each.lifetime)
    assert fixed < 18.2 * 2**20

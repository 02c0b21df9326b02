"""A cache of eight-bit keys and values, each row with its scale."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from planted import OPTIONS, Oracle, planted, serve
from safetensors.torch import load_file, save_file

from reprise import LLM
from reprise.config import EngineConfig
from reprise.doctor.memory import memory_report
from reprise.errors import ConfigError, LoadError, ModelError
from reprise.layers import SelfAttention
from reprise.ops.fp8_rows import dequantise
from reprise.platforms import Platform
from reprise.platforms.cpu import CpuPlatform
from reprise.testing import faults

FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
PROMPTS = [random_ids(60, 40), random_ids(61, 7), random_ids(62, 23)]
SCALES = (0.02, 0.04)


@pytest.fixture
def fp8(platform: Platform) -> torch.dtype:
    if platform.fp8_dtype is None:
        pytest.skip("the device has no eight-bit floating-point numbers")
    return platform.fp8_dtype


def attentions(llm: LLM) -> list[SelfAttention]:
    found = llm.engine.runner.model.modules()
    return [each for each in found if isinstance(each, SelfAttention)]


def codes_and_scales(llm: LLM) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of keys, then of values of each layer, as they lie in the cache."""
    tensors = [each.cache.tensors for each in attentions(llm)]
    return [(each[name], each[f"{name}_scales"]) for each in tensors for name in ("key", "value")]


def test_the_cache_holds_the_rows_of_a_cache_of_numbers_rounded(
    tiny: TinyModels, device: str, fp8: torch.dtype
) -> None:
    prompt = PROMPTS[0]
    plain, coded = (make_llm(tiny("qwen3"), device, **more) for more in ({}, FP8))
    for llm in (plain, coded):
        generate(llm, [prompt], greedy(1))
    table = coded.engine.runner.buffers.rows
    assert table.num_drafts == 0
    first = attentions(plain)[0].cache.tensors
    for number, name in enumerate(("key", "value")):
        codes, scales = codes_and_scales(coded)[number]
        assert (codes.dtype, scales.dtype) == (fp8, torch.float32)
        back = dequantise(codes, scales.transpose(1, 2)).flatten(0, 1)
        expected = first[name].flatten(0, 1)
        size = codes.shape[1]
        live = slice(size, size + len(prompt))  # the first request has the first blocks
        assert expected[live].abs().sum() > 0
        largest = expected[live].abs().amax(dim=-1, keepdim=True)
        # Half a code step: of the element, or of the smallest normal number.
        step = torch.maximum(expected[live].abs(), largest * 2**-14) * 2**-4
        assert ((back[live] - expected[live]).abs() <= step * 1.01).all()


def test_logits_are_near_those_of_a_cache_of_numbers(
    tiny: TinyModels, device: str, fp8: torch.dtype
) -> None:
    model = tiny("qwen3")
    llm = make_llm(model, device, **FP8)
    (output,) = llm.generate(
        [{"prompt_token_ids": PROMPTS[0]}], greedy(1, prompt_logprobs=5), use_tqdm=False
    )
    expected = model.logprobs(PROMPTS[0])
    errors = [
        abs(entry.logprob - float(expected[position - 1, token]))
        for position, found in enumerate(output.prompt_logprobs or [])
        for token, entry in (found or {}).items()
    ]
    assert 1e-4 < sum(errors) / len(errors) < 0.3


@pytest.mark.parametrize("name", ["fp8_e5m2", "int8", "nvfp4", 8])
def test_another_dtype_is_refused_by_name(name: Any) -> None:
    with pytest.raises(ConfigError, match=rf"kv_cache_dtype={name!r} must be one of auto, fp8"):
        EngineConfig(kv_cache_dtype=name)


def test_a_device_without_such_numbers_is_refused(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuPlatform, "fp8_dtype", None)
    with pytest.raises(ModelError, match=r"kv_cache_dtype='fp8': .* no eight-bit floating-point"):
        make_llm(tiny("qwen3"), "cpu", **FP8)


def test_other_eight_bit_numbers(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CDNA 3, whose largest number is 240."""
    monkeypatch.setattr(CpuPlatform, "fp8_dtype", torch.float8_e4m3fnuz)
    llm = make_llm(tiny("qwen3"), "cpu", **FP8)
    generate(llm, PROMPTS, greedy(4))
    codes, scales = codes_and_scales(llm)[0]
    assert codes.dtype == torch.float8_e4m3fnuz
    used = codes.float().abs().amax(dim=-1)[scales.transpose(1, 2) > 0]
    assert (used == 240).all()


def test_memory_is_counted(tiny: TinyModels, device: str, fp8: torch.dtype) -> None:
    """By the engine as by the doctor; a head of 16 takes 20 bytes and not 64."""
    model = tiny("qwen3")
    size = {
        "num_blocks": None,
        "kv_cache_memory_bytes": 1 << 19,
        "block_size": 16,
        "max_num_seqs": 64,
    }
    plain, coded = (make_llm(model, device, **size, **more).engine.runner for more in ({}, FP8))
    heads = attentions(make_llm(model, device, **FP8))[0]
    for llm, each in ((plain, 4 * heads.head_size), (coded, heads.head_size + 4)):
        (pool,) = llm.cache_layout.pools
        layers = len(llm.model.caches())
        assert pool.block_bytes == layers * 16 * 2 * heads.num_kv_heads * each
    assert coded.num_blocks > 3 * plain.num_blocks
    report = memory_report(EngineConfig(model=str(model.path), device=device, **size, **FP8))
    assert report.pools[0].block_bytes == coded.cache_layout.pools[0].block_bytes
    (part,) = report.caches
    assert part.rows["key_scales"] == f"[{heads.num_kv_heads}] float32"
    assert part.rows["key"].endswith("float8_e4m3fn") or device != "cpu"


def test_windows_and_kept_layers_share_a_pool(
    tiny: TinyModels, device: str, fp8: torch.dtype
) -> None:
    model = tiny("qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    layout = make_llm(model, device, block_size=16, **FP8).engine.runner.cache_layout
    assert [each.pool for each in layout.tables] == [0, 0]


# ---- scales of a checkpoint ----------------------------------------------------------------


def with_scales(model: TinyModel, path: Path, names: tuple[str, str], **config: Any) -> Path:
    """A copy whose layers have these scales of keys and values."""
    shutil.copytree(model.path, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    layers = {each.split(".self_attn.")[0] for each in tensors if ".self_attn." in each}
    for layer in layers:
        for name, scale in zip(names, SCALES, strict=True):
            shape = () if name.endswith("output_scale") else (1,)
            tensors[f"{layer}.self_attn.{name}"] = torch.full(shape, scale, dtype=torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    if config:
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**settings, **config}))
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_scales_of_a_checkpoint_are_used(
    tiny: TinyModels, device: str, fp8: torch.dtype, tmp_path: Path, names: tuple[str, str]
) -> None:
    path = with_scales(tiny("qwen3"), tmp_path / "model", names)
    llm = make_llm(TinyModel(path), device, **FP8)
    generate(llm, PROMPTS, greedy(4))
    expected = torch.tensor(SCALES, dtype=torch.bfloat16).float() * 448 / torch.finfo(fp8).max
    for number, (_, scales) in enumerate(codes_and_scales(llm)):
        used = scales[1:][scales[1:] > 0]
        assert len(used)
        torch.testing.assert_close(
            used.cpu(), expected[number % 2].expand(len(used)), rtol=1e-6, atol=0
        )
    # Those of no use are no error.
    generate(make_llm(TinyModel(path), device), PROMPTS, greedy(2))


def test_a_scale_for_each_head_is_refused(
    tiny: TinyModels, device: str, fp8: torch.dtype, tmp_path: Path
) -> None:
    path = with_scales(tiny("qwen3"), tmp_path / "model", ("k_scale", "v_scale"))
    tensors = load_file(path / "model.safetensors")
    name = next(each for each in tensors if each.endswith("k_scale"))
    save_file({**tensors, name: torch.ones(2)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=rf"wrong shape \(1\): {name}: \[2\] in the file, \[1\]"):
        make_llm(TinyModel(path), device, **FP8)


SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True,
          "dynamic": False, "observer": "minmax"}  # fmt: skip


def compressed(scheme: dict[str, Any] | None) -> dict[str, Any]:
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    return {"quantization_config": config}


def test_auto_follows_the_checkpoint(
    tiny: TinyModels, device: str, fp8: torch.dtype, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    names = ("k_scale", "v_scale")
    asks = with_scales(tiny("qwen3"), tmp_path / "asks", names, **compressed(SCHEME))
    with caplog.at_level(logging.INFO):
        llm = make_llm(TinyModel(asks), device)
    assert codes_and_scales(llm)[0][0].dtype == fp8
    assert "the checkpoint's kv_cache_scheme" in caplog.text
    silent = with_scales(tiny("qwen3"), tmp_path / "silent", names, **compressed(None))
    assert "key_scales" not in attentions(make_llm(TinyModel(silent), device))[0].cache.tensors
    other = {**SCHEME, "strategy": "attn_head"}
    odd = with_scales(tiny("qwen3"), tmp_path / "odd", names, **compressed(other))
    with pytest.raises(ModelError, match="kv_cache_scheme: strategy='attn_head' is not supported"):
        make_llm(TinyModel(odd), device)


# ---- graphs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded_oracle(tiny: TinyModels, device: str) -> Oracle:
    def oracle(**arguments: Any) -> list[list[int]]:
        return serve(make_llm(tiny("qwen3"), device, **OPTIONS, **FP8), **arguments)

    return oracle


@pytest.mark.parametrize(
    ("fault", "executor"),
    [
        ("wrong_scale", "full"), ("unscaled_row", "breakable"),
        ("scale_of_another_head", "full"), ("scale_of_another_token", "breakable"),
        ("cache_overrun", "full"), ("padding_writes_live", "full"),
    ],
)  # fmt: skip
def test_a_graph_that_is_wrong_about_scales_is_refused(
    tiny: TinyModels, device: str, fp8: torch.dtype, monkeypatch: pytest.MonkeyPatch, fault: str,
    executor: str,
) -> None:  # fmt: skip
    options = {**OPTIONS, "graph_buckets": "decode=2,4;mixed=16"}
    model = tiny("qwen3")
    expected = generate(make_llm(model, device, **FP8), PROMPTS, greedy(6))
    with planted(monkeypatch, faults.FAULTS[fault], "rotary_cache"):
        llm = make_llm(model, device, **options, graph_mode=executor, **FP8)
        assert generate(llm, PROMPTS, greedy(6)) == expected
    refused = llm.graph_report().quarantined
    assert refused
    if faults.FAULTS[fault].traced:
        assert any("rotary_cache #" in str(each.quarantined) for each in refused)


@pytest.mark.long
def test_compiled_code_may_be_a_code_step_off_and_no_more(
    tiny: TinyModels, device: str, platform: Platform, fp8: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Compiled graphs round elsewhere, so a row may fall on the other side between two codes."""
    if platform.compiler_missing() is not None:
        pytest.skip("no compiler")
    options = {"graph_mode": "compiled", "graph_buckets": "decode=2;mixed=16", "max_num_seqs": 2,
               "max_num_batched_tokens": 16}  # fmt: skip
    model = tiny("qwen3")
    llm = make_llm(model, device, **options, **FP8)
    generate(llm, PROMPTS[:2], greedy(4))
    report = llm.graph_report()
    assert not report.quarantined
    # The bound is that of rounding and not of code steps, which are 2 ** -4 of an element.
    assert report.bounds["compiled"] < 2**-8
    with planted(monkeypatch, faults.FAULTS["wrong_scale"], "rotary_cache"):
        wrong = make_llm(model, device, **options, **FP8)
    assert wrong.graph_report().quarantined

"""Stored layouts become the one that is computed: at start, in updates, and when it was spoiled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids
from quantized import AWQ_ORDER, EIGHT_BITS, FOUR_BITS, Quantized, bits, quantized, tool
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise import models
from reprise.bench.floor import weights_of_a_token
from reprise.config import EngineConfig
from reprise.doctor.memory import memory_report
from reprise.errors import ConfigError, LoadError, ModelError
from reprise.layers import Build, CausalLM, Destination, Linear
from reprise.layers.formats import formats_of
from reprise.loading import open_checkpoint
from reprise.loading.transfer import copy_to, transfer
from reprise.ops.w4_linear.reference import nibbles, pack, unpack
from reprise.platforms import Platform

METHODS = (*EIGHT_BITS, *FOUR_BITS)
PROMPTS = [random_ids(seed, 3 + 11 * seed) for seed in range(3)]

N, K, GROUP = 32, 16, 8
_rows, _columns = torch.arange(N).view(-1, 1), torch.arange(K)
NUMBERS = ((3 * _rows + 5 * _columns + _rows * _columns) % 16).byte()
ZEROS = ((7 * _rows + 3 * torch.arange(K // GROUP) + _rows * _rows) % 16).byte()
# The first words that compressed-tensors 0.20 (``pack_to_int32``) and AutoAWQ 0.2.9
# (``WQLinear_GEMM.from_linear``) make of these numbers.
GOLDEN: dict[str, list[int]] = {
    "weight_packed": [1049950800, -1239649576, -686071917, -686071917, 1888662742, -132498338],
    "weight_zero_point": [785179264, 1375671731, -1505465848, -646472389, 785179264, 1375671731],
    "awq qweight": [1603480672, -686054168, 1603480672, -686054168, 421123541, 421123541],
    "awq qzeros": [753462304, -1537186648, 753462304, -1537186648, 1595613011, -678193189],
}


def words(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[N, K] to [N, K / 8] int32, by the definition of the layouts."""
    found = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.long)
    for place, each in enumerate(order):
        found |= numbers[:, each::8].long() << 4 * place
    return found.to(torch.uint32).view(torch.int32)


def stored(method: str, zeros: Tensor) -> dict[str, Tensor]:
    scales = torch.rand(N, K // GROUP, generator=torch.Generator().manual_seed(0)) + 0.5
    if method == "compressed-tensors":
        return {
            "weight_packed": words(NUMBERS), "weight_scale": scales,
            "weight_zero_point": words(zeros.t()).t(), "weight_shape": torch.tensor([N, K]),
        }  # fmt: skip
    if method == "awq":
        return {
            "qweight": words(NUMBERS.t(), AWQ_ORDER), "qzeros": words(zeros.t(), AWQ_ORDER),
            "scales": scales.t(),
        }  # fmt: skip
    return {
        "qweight": words(NUMBERS).t(), "qzeros": words(zeros.t()), "scales": scales.t(),
        "g_idx": (_columns // GROUP).int(),
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP},
    "gptq_v2": {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False,
        "checkpoint_format": "gptq_v2",
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {
            "targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": False, "group_size": GROUP,
            },
        }},
    },
}  # fmt: skip


def test_the_definitions_are_those_of_the_libraries() -> None:
    first = {
        **stored("compressed-tensors", ZEROS),
        **{f"awq {name}": each for name, each in stored("awq", ZEROS).items()},
    }
    for name, golden in GOLDEN.items():
        assert first[name].flatten()[: len(golden)].tolist() == golden


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("merged", [False, True])
def test_four_bits_arrive_in_the_layout_that_is_computed(
    platform: Platform, method: str, merged: bool
) -> None:
    """Alone, or as the middle part of a merged product."""
    build = Build(torch.float32, platform.device, 16, formats_of(CONFIGS[method]), "model.layers.0")
    parts: dict[str, int] | int = {"a": 24, "b": N, "c": 8} if merged else N
    linear = Linear(build if merged else build.at("b"), K, parts)
    begin = 24 if merged else 0
    # The first convention stores one less; 0 is stored as 15.
    given = stored(method.removesuffix("_v2"), (ZEROS - 1) % 16 if method == "gptq" else ZEROS)
    copies = []
    for name, place in linear.destinations():
        last = name.removeprefix("model.layers.0.b.")
        if last in given:
            assert place.stored_shape == tuple(given[last].shape)
            assert place.stored_dtype == given[last].dtype
            if isinstance(place, Destination):
                copies.append(copy_to(place, given[last], name))
            else:
                assert place.check(given[last]) is None
    transfer(copies, platform)
    tensors = {name: each[begin : begin + N].cpu() for name, each in linear.tensors.items()}
    assert torch.equal(unpack(tensors["packed"]), NUMBERS)
    assert torch.equal(tensors["zeros"], ZEROS)
    assert torch.equal(tensors["scales"], given.get("weight_scale", given.get("scales", ZEROS).t()))


@pytest.mark.parametrize("inputs", [1, 7, 8, 100])
def test_packing_undoes_unpacking(inputs: int) -> None:
    numbers = torch.randint(16, (5, inputs), dtype=torch.uint8)
    packed = pack(numbers)
    assert packed.shape == (5, -(-inputs // 8))
    assert torch.equal(unpack(packed)[:, :inputs], numbers)
    assert torch.equal(bits(packed, AWQ_ORDER)[:, :inputs], numbers.long())


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_words_are_read_wherever_they_lie(size: tuple[int, int]) -> None:
    """Transposed, or a part of more, and with dimensions of one, whose stride may be anything."""
    whole = torch.randint(-(2**31), 2**31 - 1, (4, 5), dtype=torch.int32)
    given = whole[: size[0], : size[1]]
    for each in (given, given.t(), given.contiguous().t()):
        assert torch.equal(nibbles(each).long(), bits(each))


# ---- whole checkpoints -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> TinyModel:
    return tiny("qwen2", intermediate_size=160)


@pytest.fixture(scope="module")
def dense(model: TinyModel) -> CausalLM:
    """Its layers, without weights."""
    return models.build(
        open_checkpoint(str(model.path)).config, Build(torch.float32, torch.device("meta"), 16)
    )


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_updated_dummies_are_made_and_memory_is_known(
    model: TinyModel, dense: CausalLM, device: str, method: str
) -> None:
    checkpoint = quantized(model, method)
    expected = generate(make_llm(checkpoint, device), PROMPTS, greedy(6))
    llm = make_llm(checkpoint, device, load_format="dummy")
    assert generate(llm, PROMPTS, greedy(6)) != expected
    parameters = dict(llm.engine.runner.model.named_parameters())
    for name, each in parameters.items():
        if each.dtype == torch.int32:
            assert len(each.view(torch.uint8).unique()) > 100, name
        elif each.is_floating_point() and each.dim() > 1:
            assert bool((each.float().abs().amax() > 0) & each.float().isfinite().all()), name
    addresses = {name: each.data_ptr() for name, each in parameters.items()}
    llm.update_weights(load_file(checkpoint.path / "model.safetensors"))
    assert generate(llm, PROMPTS, greedy(6)) == expected
    assert {name: each.data_ptr() for name, each in parameters.items()} == addresses
    report = memory_report(EngineConfig(model=str(checkpoint.path), device="cpu", dtype="float32"))
    assert report.weights_bytes == sum(each.nbytes for each in parameters.values())
    found, plain = (weights_of_a_token(each) for each in (llm.engine.runner.model, dense))
    assert found == plain == sum(p.numel() for p in dense.model.layers.parameters() if p.dim() > 1)


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq-asymmetric"])
def test_a_part_of_a_product_is_updated(model: TinyModel, device: str, method: str) -> None:
    """Of a merged one, and alone: what is given changes, and nothing else does."""
    checkpoint = quantized(model, method)
    llm = make_llm(checkpoint, device)
    tensors = load_file(checkpoint.path / "model.safetensors")
    parameters = dict(llm.engine.runner.model.named_parameters())
    before = {name: each.detach().clone() for name, each in parameters.items()}
    first, second = ("model.layers.0.self_attn.k_proj.", "model.layers.1.self_attn.k_proj.")
    given = {
        name.replace(first, second): each
        for name, each in tensors.items()
        if name.startswith(first)
    }
    llm.update_weights(given)
    changed = {name for name, each in parameters.items() if differ(each, before[name])}
    assert changed
    assert all(name.startswith("model.layers.1.self_attn.qkv_proj.") for name in changed)
    llm.update_weights(tensors)
    assert not any(differ(each, before[name]) for name, each in parameters.items())


@pytest.mark.parametrize("method", ["fp8", "int4-asymmetric"])
def test_spoiled_weights_are_loaded_again(model: TinyModel, device: str, method: str) -> None:
    llm = make_llm(quantized(model, method), device)
    expected = generate(llm, PROMPTS, greedy(6))
    runner: Any = llm.engine.runner
    before = {name: each.detach().clone() for name, each in runner.model.named_parameters()}
    with torch.inference_mode():
        for each in runner.model.parameters():
            each.view(torch.uint8).bitwise_xor_(1)
        runner.forward_pass.reload(["all"])
    assert not any(differ(each, before[n]) for n, each in runner.model.named_parameters())
    llm.reset_prefix_cache()
    assert generate(llm, PROMPTS, greedy(6)) == expected


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def changed(checkpoint: Quantized, path: Path, **tensors: Tensor | None) -> Path:
    """A copy with some tensors replaced (None: left out), by their last two names."""
    shutil.copytree(checkpoint.path, path)
    found = load_file(path / "model.safetensors")
    for last, each in tensors.items():
        names = [name for name in found if name.endswith(last)]
        for name in names or [f"model.layers.0.{last}"]:
            if each is None:
                del found[name]
            else:
                found[name] = each.clone()
    save_file(found, path / "model.safetensors", {"format": "pt"})
    return path


def test_what_says_nothing_new_is_looked_at(model: TinyModel, device: str, tmp_path: Path) -> None:
    """A bias of zeros, groups in their order, sizes: there or not; but never otherwise."""
    gptq, int4 = quantized(model, "gptq"), quantized(model, "int4")
    expected = generate(make_llm(gptq, device), PROMPTS, greedy(6))
    bias = "self_attn.o_proj.bias"
    tensors = load_file(gptq.path / "model.safetensors")
    eights = {name: each + 0x11111111 for name, each in tensors.items() if "qzeros" in name}
    for number, others in enumerate([{bias: torch.zeros(64)}, {"g_idx": None}, eights]):
        path = changed(gptq, tmp_path / f"{number}", **others)
        assert generate(make_llm(path, device), PROMPTS, greedy(6)) == expected
    order = torch.arange(64, dtype=torch.int32).flip(0) // 32
    wrong: list[tuple[Quantized, dict[str, Tensor], str]] = [
        (gptq, {bias: torch.ones(64)}, "o_proj.bias: a bias, which this product does not have"),
        (gptq, {"o_proj.g_idx": order}, "o_proj.g_idx: inputs are in another order .*act-order"),
        (gptq, {"o_proj.qzeros": tensors["model.layers.0.self_attn.o_proj.qzeros"] + 1},
         r"o_proj.qzeros: zeros \[7, 8\]"),
        (int4, {"o_proj.weight_shape": torch.tensor([64, 63])}, r"weight_shape: \[64, 63\]"),
    ]  # fmt: skip
    for number, (checkpoint, others, message) in enumerate(wrong):
        path = changed(checkpoint, tmp_path / f"wrong {number}", **others)
        with pytest.raises(LoadError, match=f"not what the config says .*{message}"):
            make_llm(path, device)
        llm = make_llm(checkpoint, device)
        name = "model.layers.0.self_attn.o_proj."
        with pytest.raises(LoadError, match=message):
            llm.update_weights({name + k.rpartition(".")[2]: v for k, v in others.items()})


def test_files_that_do_not_fit(model: TinyModel, device: str, tmp_path: Path) -> None:
    checkpoint = quantized(model, "awq")
    tensors = load_file(checkpoint.path / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.o_proj.qweight"]
    path = changed(
        checkpoint, tmp_path / "wrong",
        **{"o_proj.qweight": weight[:32], "down_proj.qzeros": None, "up_proj.qweight":
           tensors["model.layers.0.mlp.up_proj.qweight"].float()},
    )  # fmt: skip
    with pytest.raises(LoadError) as caught:
        make_llm(path, device)
    for text in (
        "o_proj.qweight: [32, 8] in the file, [64, 8] in the model", "missing (2)",
        "down_proj.qzeros", "up_proj.qweight: float32 in the file, int32 in the model",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_the_config_of_older_tools(model: TinyModel, device: str, tmp_path: Path) -> None:
    """It lies in a file beside the model's, or in a field that has had its name changed."""
    for method, name in (
        ("gptq", "quantize_config.json"), ("awq", "quant_config.json"),
        ("int4", "compression_config"),
    ):  # fmt: skip
        checkpoint = quantized(model, method)
        expected = generate(make_llm(checkpoint, device), PROMPTS, greedy(6))
        path = Path(shutil.copytree(checkpoint.path, tmp_path / method))
        config = dict(checkpoint.config)
        quantization = config.pop("quantization_config")
        if name.endswith(".json"):
            del quantization["quant_method"]
            (path / name).write_text(json.dumps(quantization))
        else:
            config[name] = quantization
        (path / "config.json").write_text(json.dumps(config))
        assert generate(make_llm(path, device), PROMPTS, greedy(6)) == expected


@pytest.mark.parametrize("method", ["int4", "fp8-channel"])
def test_a_frozen_model_is_read_where_it_is_compressed(
    model: TinyModel, device: str, tmp_path: Path, method: str
) -> None:
    """The status says what it was in memory: what is stored decides."""
    checkpoint = quantized(model, method)
    expected = generate(make_llm(checkpoint, device), PROMPTS, greedy(6))
    path = Path(shutil.copytree(checkpoint.path, tmp_path / method))
    frozen = {**checkpoint.config["quantization_config"], "quantization_status": "frozen"}
    config = json.dumps({**checkpoint.config, "quantization_config": frozen})
    (path / "config.json").write_text(config)
    assert generate(make_llm(path, device), PROMPTS, greedy(6)) == expected
    shutil.copy(model.path / "model.safetensors", path)
    with pytest.raises(LoadError, match=r"self_attn\.q_proj\.weight"):
        make_llm(path, device)


def test_parts_in_different_formats(model: TinyModel, device: str) -> None:
    config = {"modules_to_not_convert": ["lm_head", "k_proj"]}
    with pytest.raises(ModelError, match=r"self_attn.k_proj.* different formats"):
        make_llm(quantized(model, "fp8"), device, hf_overrides={"quantization_config": config})


def test_what_the_user_says_of_the_checkpoint(model: TinyModel, device: str) -> None:
    for method, said in (("awq", "awq"), ("awq", "awq_marlin"), ("int4", "compressed-tensors")):
        make_llm(quantized(model, method), device, quantization=said)
    make_llm(model, device, quantization=None)
    with pytest.raises(
        ConfigError, match=r"quantization='fp8': the checkpoint's weights are plain"
    ):
        make_llm(model, device, quantization="fp8")
    with pytest.raises(ConfigError, match=r"quantization='gptq': .* quantised with 'awq'"):
        make_llm(quantized(model, "awq"), device, quantization="gptq")
    with pytest.raises(ConfigError, match="quantization=4 must be"):
        make_llm(model, device, quantization=4)


@pytest.mark.parametrize(
    ("method", "decode", "mixed"), [("fp8", "full", "breakable"), ("awq", "breakable", "full")]
)
def test_graphs(model: TinyModel, device: str, method: str, decode: str, mixed: str) -> None:
    checkpoint = quantized(model, method)
    expected = generate(make_llm(checkpoint, device), PROMPTS, greedy(12))
    llm = make_llm(
        checkpoint, device, max_num_seqs=4, max_num_batched_tokens=32, graph_verify="canary:2",
        graph_buckets="decode=4;mixed=32", graph_mode=f"decode={decode},mixed={mixed}",
    )  # fmt: skip
    assert generate(llm, PROMPTS, greedy(12)) == expected
    report = llm.graph_report()
    assert report.plan == {"decode": decode, "mixed": mixed}
    assert all(each.verified and each.quarantined is None for each in report.graphs)
    assert report.replays > 0


def test_the_tool_leaves_nothing_behind_where_it_fails(model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inputs, no multiple of 96"):
        tool().quantize(model.path, tmp_path / "awq", "awq", 96)
    assert not (tmp_path / "awq").exists()
    with pytest.raises(FileExistsError):
        tool().quantize(model.path, tmp_path, "fp8")
    assert tmp_path.exists()


def test_the_tool_writes_nothing_that_no_engine_loads(model: TinyModel, tmp_path: Path) -> None:
    def refused(source: Path, method: str, group: int, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            tool().quantize(source, tmp_path / "out", method, group)
        assert not (tmp_path / "out").exists()

    for group in (0, -1, 12):
        refused(model.path, "gptq", group, f"--group-size {group}: give a multiple of 8")
    refused(quantized(model, "fp8").path, "int4", 32, "is quantised: give the checkpoint")
    odd = tmp_path / "odd"
    shutil.copytree(model.path, odd)
    name = "model.layers.0.mlp.up_proj.weight"
    for shape, value, why in (
        ((90, 64), 1.0, f"{name} has 90 outputs, no multiple of 8"),
        ((96, 64), torch.nan, f"{name} has numbers that are not finite"),
    ):
        save_file({name: torch.full(shape, value)}, odd / "model.safetensors")
        refused(odd, "awq", 32, why)
    (odd / "model.safetensors").rename(odd / "pytorch_model.bin")
    refused(odd, "fp8", 32, "has no .*safetensors file")


def test_the_tool_reads_what_is_loaded(model: TinyModel, device: str, tmp_path: Path) -> None:
    """The model maker's own format may lie beside it."""
    both = tmp_path / "both"
    shutil.copytree(model.path, both)
    save_file({"tok_embeddings.weight": torch.ones(3)}, both / "consolidated.safetensors")
    tool().quantize(both, tmp_path / "out", "int4", 32)
    same = generate(make_llm(quantized(model, "int4"), device), [[5, 6]], greedy(4))
    assert generate(make_llm(tmp_path / "out", device), [[5, 6]], greedy(4)) == same

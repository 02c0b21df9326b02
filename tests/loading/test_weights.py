"""Checkpoints on disk into parameters: every layout, and every way in which they can be broken."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    TinyModel,
    TinyModels,
    generate,
    greedy,
    make_llm,
    random_ids,
    random_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from reprise.errors import LoadError, ModelError
from reprise.layers import CausalLM, Place, SelfAttention
from reprise.loading import transfer
from reprise.loading.destinations import destinations

PROMPT = random_ids(1, 20)


def taken(model: CausalLM) -> dict[str, list[Place]]:
    """Where the tensors go of which the model takes something."""
    return {name: places for name, places in destinations(model).items() if places}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def check_greedy(model: TinyModel, device: str, **options: Any) -> None:
    output = generate(make_llm(model, device, **options), [PROMPT], greedy(24))[0]
    assert model.is_greedy(PROMPT, output)


@pytest.fixture
def copy(tiny: TinyModels, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny("qwen3").path, tmp_path / "model"))


# ---- layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_with_an_index(tmp_path: Path, device: str, architecture: str) -> None:
    random_model(architecture).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").exists()
    check_greedy(TinyModel(tmp_path), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(tmp_path: Path, device: str, dtype: torch.dtype) -> None:
    random_model("qwen3").to(dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {each.dtype for each in stored.values()} == {dtype}
    check_greedy(TinyModel(tmp_path), device)


def test_computes_in_half_precision(tiny: TinyModels, device: str) -> None:
    """bfloat16 gives other tokens in the end, but close logits: the likeliest one at first."""
    model = tiny("qwen3")
    llm = make_llm(model, device, dtype="bfloat16")
    assert {each.dtype for each in llm.engine.runner.model.parameters()} == {torch.bfloat16}
    first = generate(llm, [PROMPT], greedy(1))[0][0]
    logprobs = model.logprobs(PROMPT)[-1]
    assert float(logprobs.max() - logprobs[first]) < 0.2


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_checkpoint_that_stores_its_head(
    tmp_path: Path, device: str, architecture: str, alone: bool
) -> None:
    random_model(architecture, tie_word_embeddings=True).save_pretrained(tmp_path)

    def store_head(tensors: dict[str, Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if alone:
            del tensors["model.embed_tokens.weight"]

    rewrite(tmp_path, store_head)
    check_greedy(TinyModel(tmp_path), device)


@pytest.mark.parametrize("beside", ["adapter_model.safetensors", "model_old.safetensors"])
def test_other_files_beside_the_models_are_not_read(copy: Path, device: str, beside: str) -> None:
    zeros = {name: each * 0 for name, each in load_file(copy / "model.safetensors").items()}
    save_file(zeros, copy / beside, {"format": "pt"})
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "no such file"}}')
    check_greedy(TinyModel(copy), device)


def test_files_of_any_name(copy: Path, device: str) -> None:
    shard(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model-00001-of-00002.safetensors").rename(copy / "weights.safetensors")
    prompt = greedy(8)
    output = generate(make_llm(copy, device), [PROMPT], prompt)[0]
    shutil.copy(copy / "weights.safetensors", copy / "once more.safetensors")
    with pytest.raises(LoadError) as caught:
        make_llm(copy, device)
    for each in ("once more.safetensors", "weights.safetensors", "remove one"):
        assert each in str(caught.value)
    assert len(output) == 8


def test_stored_rotary_tables_are_ignored(tmp_path: Path, device: str) -> None:
    random_model("llama").save_pretrained(tmp_path)

    def store(tensors: dict[str, Tensor]) -> None:
        for name in ("inv_freq", "cos_cached", "sin_cached"):
            tensors[f"model.layers.0.self_attn.rotary_emb.{name}"] = torch.zeros(1, 1, 8, 16)

    rewrite(tmp_path, store)
    check_greedy(TinyModel(tmp_path), device)


def test_tied_by_the_config_but_stored_with_another_head(
    tiny: TinyModels, tmp_path: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is stored is used, as transformers does, and said."""
    path = Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    with caplog.at_level("WARNING", "reprise"):
        check_greedy(TinyModel(path), device)
    (line,) = [each.message for each in caplog.records if each.name == "reprise.loading.weights"]
    assert "lm_head.weight" in line
    assert "the stored one is used" in line
    llm = make_llm(path, device, graph_mode="full")
    assert not llm.engine.runner.model.tied
    assert TinyModel(path).is_greedy(PROMPT, generate(llm, [PROMPT], greedy(24))[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_weight_beside_its_parts_is_unexpected(
    tmp_path: Path, device: str, tied: bool
) -> None:
    """It has the name of a parameter of ours, and of nothing that a checkpoint has."""
    random_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(128, 64)}))
    with pytest.raises(LoadError, match="unexpected") as caught:
        make_llm(tmp_path, device)
    assert name in str(caught.value)


def test_tied_head_of_another_shape(copy: Path, device: str) -> None:
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 7)}))
    with pytest.raises(LoadError, match=r"wrong shape.*lm_head.weight: \[5, 7\] in the file"):
        make_llm(copy, device, hf_overrides={"tie_word_embeddings": True})


@pytest.mark.parametrize("chosen", [1, 2])
def test_of_a_tensor_in_two_shards_the_index_decides(copy: Path, device: str, chosen: int) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    shard(copy)
    right = load_file(copy / "model-00001-of-00002.safetensors") | load_file(
        copy / "model-00002-of-00002.safetensors"
    )
    for number in (1, 2):
        file = copy / f"model-0000{number}-of-00002.safetensors"
        tensors = load_file(file)
        tensors[name] = right[name] * (1 if number == chosen else 0)
        save_file(tensors, file, {"format": "pt"})
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = f"model-0000{chosen}-of-00002.safetensors"
    index.write_text(json.dumps(content))
    model = make_llm(copy, device).engine.runner.model
    for each, (destination,) in taken(model).items():
        assert torch.equal(destination.target.cpu(), right[each]), each
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(LoadError, match="remove one of them") as caught:
        make_llm(copy, device)
    assert name in str(caught.value)


def test_dummy_weights_need_a_config_alone(tiny: TinyModels, tmp_path: Path, device: str) -> None:
    shutil.copy(tiny("qwen3").path / "config.json", tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        llm = make_llm(model, device, load_format="dummy", skip_tokenizer_init=True)
        assert len(generate(llm, [PROMPT], greedy(8))[0]) == 8

    def weights(seed: int) -> dict[str, Tensor]:
        llm = make_llm(tmp_path, device, load_format="dummy", seed=seed)
        return llm.engine.runner.model.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    for name, tensor in first.items():
        assert bool(tensor.isfinite().all())
        assert torch.equal(tensor, again[name])
        if tensor.dim() > 1:
            assert not torch.equal(tensor, other[name])
            assert 0.015 < float(tensor.std()) < 0.025


def test_config_overrides(tiny: TinyModels, tmp_path: Path, device: str) -> None:
    """As if the config had said so."""
    path = Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))
    overrides = {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        "rms_norm_eps": 0.01,
    }
    plain = generate(make_llm(path, device), [PROMPT], greedy(24))
    changed = generate(make_llm(path, device, hf_overrides=overrides), [PROMPT], greedy(24))
    assert changed != plain
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **overrides}))
    assert TinyModel(path).is_greedy(PROMPT, changed[0])


def test_fewer_layers_by_an_override(tiny: TinyModels, device: str) -> None:
    """Lists of the file with an entry for each layer are cut; a list that is given is not."""
    fields: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "smollm3": {"no_rope_layers": [0, 1, 1]},
    }
    for architecture, others in fields.items():
        model = tiny(architecture, num_hidden_layers=3, **others)
        written = json.loads((model.path / "config.json").read_text())
        assert architecture == "llama" or len(written["layer_types"]) == 3
        options = {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": 2}}
        modules = make_llm(model, device, **options).engine.runner.model.modules()
        layers = [each for each in modules if isinstance(each, SelfAttention)]
        assert len(layers) == 2
        if architecture == "qwen3":
            assert [each.sliding_window for each in layers] == [0, 8]
        if architecture == "smollm3":
            assert [each.cos_sin.shape[1] for each in layers] == [2, 16]
    both = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 3}
    with pytest.raises(ModelError, match="layer_types"):
        make_llm(tiny("qwen3"), device, load_format="dummy", hf_overrides=both)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        make_llm(tiny("qwen3"), device, load_format="dummy", hf_overrides={"num_hidden_layers": 4})


@pytest.mark.parametrize("staging", [1, 1000, 8 << 20])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_what_the_shards_hold(
    tmp_path: Path,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    tied: bool,
    staging: int,
) -> None:
    """In pieces of any size, merged layers and heads that share the embedding included."""
    monkeypatch.setattr(transfer, "STAGING_BYTES", staging)
    model = random_model(architecture, tie_word_embeddings=tied, vocab_size=157)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    stored: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored.update(load_file(file))
    for dtype in (torch.float32, torch.bfloat16):
        llm = make_llm(tmp_path, device, dtype=str(dtype).removeprefix("torch."))
        loaded = taken(llm.engine.runner.model)
        assert loaded.keys() == stored.keys() | ({"lm_head.weight"} if tied else set())
        for name, tensor in stored.items():
            (destination,) = loaded[name]
            assert torch.equal(destination.target.cpu(), tensor.to(dtype)), name


def test_log_says_how_fast(tiny: TinyModels, device: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "reprise.loading"):
        make_llm(tiny("llama"), device)
    (line,) = [each.message for each in caplog.records if each.message.startswith("weights")]
    assert re.fullmatch(r"weights: \d+\.\d\d GiB \(auto\) in \d+\.\d\d s, \d+\.\d\d GB/s", line)


# ---- faults ------------------------------------------------------------------------------


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_in_the_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def not_safetensors(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 1000)


def spoiled_header(path: Path) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:60] = bytes(52)
    file.write_bytes(content)


def fifo(path: Path) -> None:
    """To open it would wait for a writer, for ever."""
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def fifo_of_any_name(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "weights.safetensors")


def fifo_as_shard(path: Path) -> None:
    missing_shard(path)
    os.mkfifo(path / "model-00002-of-00002.safetensors")


def fifo_as_index(path: Path) -> None:
    shard(path)
    (path / "model.safetensors.index.json").unlink()
    os.mkfifo(path / "model.safetensors.index.json")


def device_as_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("/dev/zero")


def directory_as_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def index_to(name: str) -> Callable[[Path], None]:
    """An index with one entry changed."""

    def change(path: Path) -> None:
        shutil.copy(path / "model.safetensors", path.parent / "outside.safetensors")
        shard(path)
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = name.format(parent=path.parent)
        index.write_text(json.dumps(content))

    change.__name__ = f"index_to_{name}"[:40]
    return change


def nested_index(path: Path) -> None:
    shard(path)
    (path / "model.safetensors.index.json").write_text("[" * 100_000)


def missing_shard(path: Path) -> None:
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(path: Path) -> None:
    shard(path)
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def spoiled_index(path: Path) -> None:
    shard(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {')


def index_without_a_map(path: Path) -> None:
    shard(path)
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')


def index_of_numbers(path: Path) -> None:
    shard(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')


def index_of_a_wrong_type(path: Path) -> None:
    shard(path)
    (path / "model.safetensors.index.json").write_text("[1, 2]")


def shard(path: Path) -> None:
    """Split the one file in two, with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def pointer(path: Path) -> None:
    """What a clone without Git LFS leaves."""
    (path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    )


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (pointer, ["model.safetensors", "pointer of Git LFS", "git lfs pull"]),
        (no_weights, ["no *.safetensors file", "load_format='dummy'"]),
        (truncated, ["model.safetensors", "corrupted"]),
        (truncated_in_the_header, ["model.safetensors", "corrupted"]),
        (empty, ["model.safetensors", "corrupted"]),
        (not_safetensors, ["model.safetensors", "corrupted"]),
        (spoiled_header, ["model.safetensors", "corrupted"]),
        (missing_shard, ["model-00002-of-00002.safetensors", "index.json"]),
        (truncated_shard, ["model-00002-of-00002.safetensors", "corrupted"]),
        (spoiled_index, ["index.json", "not a valid weight index"]),
        (index_without_a_map, ["index.json", "not a valid weight index", "weight_map"]),
        (index_of_numbers, ["index.json", "not a valid weight index"]),
        (index_of_a_wrong_type, ["index.json", "not a valid weight index"]),
        (nested_index, ["index.json", "not a valid weight index", "nested"]),
        (fifo, ["model.safetensors", "a FIFO"]),
        (fifo_of_any_name, ["weights.safetensors", "a FIFO"]),
        (fifo_as_shard, ["model-00002-of-00002.safetensors", "a FIFO"]),
        (fifo_as_index, ["index.json", "a FIFO"]),
        (device_as_weights, ["model.safetensors", "a device"]),
        (directory_as_weights, ["model.safetensors", "a directory"]),
        (index_to("../outside.safetensors"), ["model.norm.weight", "'../outside.safetensors'"]),
        (index_to("{parent}/outside.safetensors"), ["model.norm.weight", "outside.safetensors'"]),
        (index_to("a/../../outside.safetensors"), ["model.norm.weight", "not in the checkpoint"]),
        (index_to(""), ["a directory"]),
        (index_to("\0"), ["model.norm.weight", "not in the checkpoint"]),
        (index_to("x" * 5000), ["cannot be read", "too long"]),
        (index_to("config.json"), ["config.json", "corrupted"]),
    ],
)
def test_broken_files(
    copy: Path, device: str, spoil: Callable[[Path], None], named: list[str]
) -> None:
    spoil(copy)
    with pytest.raises(LoadError) as caught:
        make_llm(copy, device)
    for each in named:
        assert each in str(caught.value)


def test_shards_load_when_nothing_is_broken(copy: Path, device: str) -> None:
    shard(copy)
    check_greedy(TinyModel(copy), device)


def test_all_wrong_tensors_are_listed_at_once(copy: Path, device: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["visual.proj"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(5, 7)
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(64, 96)

    rewrite(copy, spoil)
    with pytest.raises(LoadError) as caught:
        make_llm(copy, device)
    message = str(caught.value)
    for each in (
        "missing (2): model.layers.1.self_attn.k_proj.weight, model.norm.weight",
        "unexpected (2): model.layers.9.mlp.up_proj.weight, visual.proj",
        "wrong shape (2): ",
        "lm_head.weight: [5, 7] in the file, [160, 64] in the model",
        "model.layers.0.mlp.gate_proj.weight: [64, 96] in the file, [96, 64] in the model",
    ):
        assert each in message


def test_a_truncated_shard_among_good_ones(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, it alone, and before anything is copied."""
    random_model("qwen3").save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    truncated = files[len(files) // 2]
    truncated.write_bytes(truncated.read_bytes()[:-2])
    monkeypatch.setattr(transfer, "ThreadPoolExecutor", lambda *_: pytest.fail("copies"))
    with pytest.raises(LoadError) as caught:
        make_llm(tmp_path, device)
    message = str(caught.value)
    assert [each for each in files if each.name in message] == [truncated]


def test_weights_of_another_config(tiny: TinyModels, tmp_path: Path, device: str) -> None:
    """Nothing is silently dropped or left unset when the config asks for another model."""
    path = Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))
    with pytest.raises(LoadError) as fewer:
        make_llm(path, device, hf_overrides={"num_hidden_layers": 1})
    assert "unexpected (9)" in str(fewer.value)
    with pytest.raises(LoadError) as bias:
        make_llm(path, device, hf_overrides={"attention_bias": True})
    assert "missing (8)" in str(bias.value)

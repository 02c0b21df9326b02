"""Finding a checkpoint and reading what describes it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyModel, TinyModels, generate, greedy, make_llm, random_ids

from reprise import LLM
from reprise.errors import LoadError, ModelError, RepriseError
from reprise.loading import open_checkpoint
from reprise.loading.checkpoint import DEMO_MODEL


@pytest.fixture
def copy(tiny: TinyModels, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))


def change_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))


def check_refused(path: Path, error: type[RepriseError], named: list[str]) -> None:
    with pytest.raises(error) as caught:
        LLM(str(path), device="cpu", skip_tokenizer_init=True)
    for each in named:
        assert each in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_unknown_directory(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        LLM(name, device="cpu")
    assert repr(name) in str(caught.value)
    assert "no such directory" in str(caught.value)


def test_unknown_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        LLM("nobody/no-such-model", device="cpu")
    assert "nobody/no-such-model" in str(caught.value)
    assert "local directory" in str(caught.value)


@pytest.mark.parametrize("name", ["no such model!", "a//b", "-"])
def test_neither_a_directory_nor_an_id(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="model="):
        LLM(name, device="cpu")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "~nobody-of-that-name/model", "/" + "y" * 300]
)
def test_names_that_are_no_paths(name: str) -> None:
    with pytest.raises(ModelError, match="model="):
        LLM(name, device="cpu")


def test_directory_without_a_config(tmp_path: Path) -> None:
    check_refused(tmp_path, ModelError, [str(tmp_path), "config.json"])


FOREIGN = [
    ("model-Q4_K_M.gguf", ["GGUF", "llama.cpp", "Hugging Face format"]),
    ("pytorch_model.bin", ["pickled", "save_pretrained"]),
    ("pytorch_model-00001-of-00002.bin", ["pickled", "save_pretrained"]),
    ("model.pth", ["pickled", "save_pretrained"]),
    ("consolidated.00.pth", ["own format"]),
    ("consolidated.safetensors", ["own format"]),
    ("tf_model.h5", ["TensorFlow"]),
    ("flax_model.msgpack", ["Flax"]),
    ("model.onnx", ["ONNX"]),
]


@pytest.mark.parametrize(("name", "named"), FOREIGN)
def test_directories_of_other_formats(copy: Path, name: str, named: list[str]) -> None:
    """With a config and without; and the file itself."""
    if not name.endswith(".safetensors"):
        (copy / "model.safetensors").rename(copy / name)
        check_refused(copy, LoadError, [name, "no *.safetensors", *named])
    else:
        (copy / "model.safetensors").rename(copy / name)
    (copy / "config.json").unlink()
    check_refused(copy, ModelError, [name, "no config.json", *named])
    check_refused(copy / name, ModelError, [name, "the checkpoint's directory", *named])


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    check_refused(tmp_path, ModelError, ["adapter_config.json", "merge it into its base model"])


def test_a_file_that_is_not_the_config(copy: Path) -> None:
    (copy / "other.json").write_text((copy / "config.json").read_text())
    check_refused(copy / "other.json", ModelError, ["other.json", "the checkpoint's directory"])


@pytest.mark.parametrize("names", ["drop", [], None])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_architectures_by_the_model_type(
    tiny: TinyModels,
    tmp_path: Path,
    device: str,
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    names: Any,
) -> None:
    """They are those of transformers' AutoModelForCausalLM, which is the oracle of the tokens."""
    path = Path(shutil.copytree(tiny(architecture).path, tmp_path / "model"))
    change_config(path, architectures=names)
    prompt = random_ids(1, 20)
    with caplog.at_level("INFO", "reprise"):
        (output,) = generate(make_llm(path, device), [prompt], greedy(8))
    assert TinyModel(path).is_greedy(prompt, output)
    assert any("architectures: " in each.message for each in caplog.records)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
         "text_config": {"model_type": "qwen3_vl_text"}, "vision_config": {"depth": 2}},
        {"model_type": "glm4v", "architectures": ["Glm4vForConditionalGeneration"],
         "text_config": {}, "vision_config": {}},
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
         "text_config": {}, "vision_config": {}},
        {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"],
         "audio_config": {}},
        {"model_type": "not_yet_known", "architectures": ["NewVLForConditionalGeneration"],
         "vision_config": {}},
    ],
)  # fmt: skip
def test_multimodal_models_are_called_so(tmp_path: Path, config: dict[str, Any]) -> None:
    """Before anything of their config is read, by whatever version of transformers."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = [config["architectures"][0], "multimodal", "not supported", "Qwen3ForCausalLM"]
    check_refused(tmp_path, ModelError, named)


@pytest.mark.parametrize(
    "eos", ["stop", 1.5, [1, "x"], {"a": 1}, True, [[1]], [None]]
)  # fmt: skip
def test_end_of_text_that_is_no_token(copy: Path, eos: Any) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    check_refused(copy, LoadError, ["generation_config.json", "eos_token_id"])
    (copy / "generation_config.json").unlink()
    change_config(copy, eos_token_id=eos)
    check_refused(copy, ModelError, ["config.json", "eos_token_id"])


@pytest.mark.parametrize(
    "content", ["", "{", "\x00\xff", "[]", "3", '"qwen3"', "null", "[" * 100_000, '{"a":' * 9999]
)
def test_config_that_is_none(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content, encoding="latin-1")
    check_refused(copy, ModelError, ["config.json"])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "drop"}, ["model_type"]),
        ({"model_type": 3}, ["model_type"]),
        ({"model_type": "nonesuch"}, ["LlamaForCausalLM", "nonesuch", "newer"]),
        ({"model_type": "mistral"}, ["LlamaForCausalLM", "'mistral'", "'llama'", "contradict"]),
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "'llama'"]),
        ({"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM", "'llama'", "'qwen2'"]),
        ({"architectures": ["NoneSuchForCausalLM"]}, ["NoneSuchForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": "drop", "model_type": "gpt2"}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": "drop", "model_type": "vit"}, ["no architectures", "'vit'"]),
        ({"architectures": [], "model_type": "nonesuch"}, ["no architectures", "'nonesuch'"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures='LlamaForCausalLM'"]),
        ({"architectures": 3}, ["architectures"]),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel"]),
        ({"model_type": "bert", "architectures": ["BertModel"]}, ["BertModel"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
        ({"vocab_size": -4}, ["vocab_size=-4"]),
        ({"hidden_size": 0}, ["hidden_size=0"]),
        ({"head_dim": 15}, ["head_dim=15", "even"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["spiral"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            ["low_freq_factor"],
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}}, ["fact"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
        ({"dtype": "float99"}, ["float99"]),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, ["per_layer_config", "skip"]),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, ["intermediate_size"]),
        ({"dtype": "int8"}, ["dtype=torch.int8"]),
    ],
)
def test_config_that_cannot_be_built(copy: Path, fields: dict[str, Any], named: list[str]) -> None:
    change_config(copy, **fields)
    check_refused(copy, ModelError, named)


def test_heads_that_do_not_fit_the_width(copy: Path) -> None:
    """Newer transformers refuses the config; with older ones the weights do not fit."""
    change_config(copy, hidden_size=65)
    check_refused(copy, RepriseError, ["65"])


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_fifos_do_not_hang(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    check_refused(copy, RepriseError, [name])
    check_refused(copy / name, ModelError, [name, "the checkpoint's directory"])


@pytest.mark.parametrize(
    "content", ["{", "[]", "\x00", "[" * 100_000, '{"do_sample": "no"}', '{"do_sample": 0}']
)
def test_spoiled_generation_config(copy: Path, content: str) -> None:
    (copy / "generation_config.json").write_text(content)
    check_refused(copy, LoadError, ["generation_config.json"])


@pytest.mark.parametrize(
    "recommended",
    [{"temperature": "0.7"}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": 1.5},
     {"repetition_penalty": 0}, {"max_new_tokens": -1}, {"min_p": True}],
)  # fmt: skip
def test_what_no_request_could_ask_for_is_the_file_s_fault(
    copy: Path, recommended: dict[str, Any]
) -> None:
    """And not that of a request that leaves the field out."""
    (copy / "generation_config.json").write_text(json.dumps(recommended))
    (name,) = recommended
    check_refused(
        copy,
        LoadError,
        ["generation_config.json", {"max_new_tokens": "max_tokens"}.get(name, name)],
    )


@pytest.mark.parametrize(
    ("recommended", "named"),
    [
        ({"suppress_tokens": [3], "no_repeat_ngram_size": 3}, ["suppress_tokens=[3]", "size=3"]),
        ({"num_beams": 4, "guidance_scale": 1.5, "stop_strings": ["x"]},
         ["num_beams=4", "guidance_scale=1.5", "stop_strings=['x']"]),
        ({"num_beams": 1, "suppress_tokens": None, "bad_words_ids": [], "typical_p": 1.0,
          "min_length": 0, "max_length": 20, "length_penalty": 1.0, "use_cache": True}, []),
    ],
)  # fmt: skip
def test_what_is_recommended_and_not_followed_is_logged(
    copy: Path, recommended: dict[str, Any], named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "generation_config.json").write_text(json.dumps(recommended))
    with caplog.at_level(logging.WARNING):
        open_checkpoint(str(copy))
    assert ("not followed" in caplog.text) == bool(named)
    assert all(each in caplog.text for each in named)


def test_no_tokenizer(copy: Path) -> None:
    for tokenizer, reason in ((None, str(copy)), ("/no/such/place", "no such directory")):
        with pytest.raises(ModelError) as caught:
            LLM(str(copy), device="cpu", tokenizer=tokenizer)
        assert "skip_tokenizer_init=True" in str(caught.value)
        assert reason in str(caught.value)


def test_demo_model_without_its_tokenizer(tmp_path: Path) -> None:
    path = Path(shutil.copytree(DEMO_MODEL, tmp_path / "demo"))
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer in"):
        LLM(str(path), device="cpu")


def test_config_of_older_transformers(copy: Path, device: str) -> None:
    """rope_scaling and rope_theta beside each other, torch_dtype, scaling type under "type"."""
    parameters = {"rope_type": "linear", "factor": 2.0}
    change_config(copy, rope_parameters={**parameters, "rope_theta": 700.0})
    prompt = random_ids(1, 40)
    new = generate(make_llm(copy, device), [prompt], greedy(24))
    assert TinyModel(copy).is_greedy(prompt, new[0])
    for scaling in (parameters, {"type": "linear", "factor": 2.0}):
        change_config(
            copy,
            rope_parameters="drop",
            dtype="drop",
            torch_dtype="float32",
            rope_scaling=scaling,
            rope_theta=700.0,
        )
        assert generate(make_llm(copy, device), [prompt], greedy(24)) == new


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, set()),
        (None, 5, {5}),
        (None, [5, 6], {5, 6}),
        (7, 5, {5, 7}),
        ([7, 8], None, {7, 8}),
        (0, 0, {0}),
    ],
)
def test_end_of_text_tokens(copy: Path, generation: Any, config: Any, expected: set[int]) -> None:
    change_config(copy, eos_token_id=config)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert open_checkpoint(str(copy)).stop_token_ids == expected


def test_recommended_sampling(copy: Path, device: str) -> None:
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    (copy / "generation_config.json").write_text(json.dumps({**recommended, "do_sample": True}))
    params = make_llm(copy, device).get_default_sampling_params()
    assert {name: getattr(params, name) for name in recommended} == recommended
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert make_llm(copy, device).get_default_sampling_params().greedy

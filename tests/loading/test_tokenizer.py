"""Which files decide ids, special tokens and chat templates."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import CORPUS, TinyModels, byte_level_tokenizer, text_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from reprise import LLM
from reprise.errors import ModelError
from reprise.loading import end_of_text_id, open_checkpoint
from reprise.loading.checkpoint import DEMO_MODEL
from reprise.loading.tokenizer import load_tokenizer

SAMPLES = [*CORPUS[:5], "", " ", "  two  spaces\n\n", "2026 12345", "<eos><user>a <eos>", "don't"]


def byte_level(first: Any = None) -> Tokenizer:
    """As GPT-2 has it, behind another splitter."""
    pipeline = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*([first] if first else []), *pipeline])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>", "<user>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_begin(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 1)]
    )
    return tokenizer


def with_settings_of_training(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50, pad_token="<eos>")
    return tokenizer


PIPELINES: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "single digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "lines": lambda: byte_level(pre_tokenizers.Split("\n", "isolated")),
    "begin": lambda: with_begin(byte_level()),
    "cut and filled": lambda: with_settings_of_training(byte_level()),
}


def write(path: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(
    "name",
    ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer",
     "Qwen2Tokenizer", "GemmaTokenizer", "NoSuchTokenizer", None],
)  # fmt: skip
def test_the_name_of_a_class_decides_nothing(
    tmp_path: Path, pipeline: str, name: str | None
) -> None:
    """The DeepSeek distillations are labelled LlamaTokenizerFast, SmolLM GPT2Tokenizer."""
    config = {
        "tokenizer_class": name, "add_bos_token": True, "add_eos_token": True,
        "bos_token": "<user>", "eos_token": "<eos>", "add_prefix_space": True, "legacy": False,
        "clean_up_tokenization_spaces": True, "split_special_tokens": True,
    }  # fmt: skip
    found = load_tokenizer(write(tmp_path, PIPELINES[pipeline](), **config))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    for text in SAMPLES:
        for special in (True, False):
            ids = library.encode(text, add_special_tokens=special).ids
            assert found.encode(text, add_special_tokens=special) == ids
        assert found.decode(ids, skip_special_tokens=True) == library.decode(ids)


def test_the_demo_model() -> None:
    found = open_checkpoint(None).tokenizer()
    library = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    assert [found.encode(text) for text in SAMPLES] == [library.encode(t).ids for t in SAMPLES]
    assert found.eos_token_id == end_of_text_id(found) == 0


@pytest.mark.parametrize("as_file", [True, False])
def test_another_directory_or_its_file(tmp_path: Path, as_file: bool) -> None:
    write(tmp_path, byte_level())
    place = tmp_path / "tokenizer.json" if as_file else tmp_path
    assert len(open_checkpoint(None).tokenizer(str(place))) == 330


def added(token: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": token, "lstrip": True, "normalized": True,
            "rstrip": True, "single_word": False}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"eos_token": "<eos>"}, {}, "<eos>"),
        ({"eos_token": added("<eos>")}, {}, "<eos>"),
        ({}, {"eos_token": "<eos>"}, "<eos>"),
        ({}, {"eos_token": {"content": "<eos>", "lstrip": True}}, "<eos>"),
        ({"eos_token": "<eos>"}, {"eos_token": "<user>"}, "<user>"),
        ({"eos_token": "<eos>", "added_tokens_decoder": {}}, {"eos_token": "<user>"}, "<eos>"),
        ({"eos_token": None}, {}, None),
        ({"eos_token": "a"}, {}, "a"),
        ({"eos_token": "<nowhere>", "unk_token": "<user>"}, {}, None),
        ({"added_tokens_decoder": {"0": {"content": "<eos>", "lstrip": True}}}, {}, None),
    ],
)
def test_special_tokens(
    tmp_path: Path, config: Any, names: Any, expected: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """They get roles, and change neither ids nor texts."""
    write(tmp_path, byte_level(), **config, additional_special_tokens=["<user>", "<none>"])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    with caplog.at_level(logging.WARNING):
        found = load_tokenizer(tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.eos_token == expected
    assert end_of_text_id(found) == (None if expected is None else library.token_to_id(expected))
    assert ("'<nowhere>'" in caplog.text) == ("<nowhere>" in config.values())
    assert "'<none>'" in caplog.text
    assert len(found) == 330
    for text in (*SAMPLES, "a <eos> b <user> <nowhere>"):
        ids = library.encode(text).ids
        assert found.encode(text) == ids
        assert found.decode(ids, skip_special_tokens=True) == library.decode(ids)


def test_the_token_for_unknown_text_ends_nothing(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token, tokenizer.unk_token = "<gone>", "<user>"
    assert tokenizer.eos_token_id == 1
    assert end_of_text_id(tokenizer) is None


TEMPLATES: list[tuple[dict[str, Any], dict[str, str], Any]] = [
    ({}, {}, None),
    ({"chat_template": "config"}, {}, "config"),
    ({"chat_template": "config"}, {"chat_template.jinja": "file"}, "file"),
    ({}, {"chat_template.json": '{"chat_template": "json"}'}, "json"),
    ({"chat_template": "config"}, {"chat_template.json": '{"chat_template": "json"}'}, "config"),
    (
        {"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]},
        {},
        {"default": "a", "rag": "b"},
    ),
    (
        {"chat_template": "config"},
        {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"},
        {"default": "file", "tool_use": "tools"},
    ),
]


@pytest.mark.parametrize(("config", "files", "expected"), TEMPLATES)
def test_chat_templates(
    tmp_path: Path, config: dict[str, Any], files: dict[str, str], expected: Any
) -> None:
    write(tmp_path, byte_level(), **config)
    (tmp_path / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert load_tokenizer(tmp_path).chat_template == expected


def test_without_a_tokenizer_json_transformers_decides(tmp_path: Path) -> None:
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *"abc", "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert found.encode("abc") == [4, 3]
    assert end_of_text_id(found) == 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "\udcff"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"eos_token": {"text": "<eos>"}}'),
        ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 5}]}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("chat_template.json", '{"chat_template": {"default": null}}'),
        ("special_tokens_map.json", '"<eos>"'),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_spoiled_files(tmp_path: Path, file: str, content: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / file).write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError, match="no tokenizer in") as caught:
        open_checkpoint(None).tokenizer(str(tmp_path))
    assert "skip_tokenizer_init=True" in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_what_a_clone_without_lfs_leaves(tmp_path: Path, file: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    with pytest.raises(ModelError, match=r"pointer of Git LFS.*'git lfs pull'"):
        open_checkpoint(None).tokenizer(str(tmp_path))


def test_what_is_fetched_of_a_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its templates in a folder too, but nothing that other tools put into folders."""
    from huggingface_hub.utils import filter_repo_objects

    def fetch(name: str, *, revision: str, allow_patterns: Any, ignore_patterns: Any) -> str:
        assert (name, revision) == ("someone/something", "v2")
        files = [
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
            "chat_template.jinja", "additional_chat_templates/rag.jinja", "original/params.json",
            "model.safetensors", "original/tokenizer.model", "onnx/model.safetensors",
            "tokenizer.model", "encoding/encoding_dsv4.py", "consolidated.json", "README.md",
            "modeling_remote.py", "encoding/other.py",
        ]  # fmt: skip
        found = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert set(found) == {*files[:6], "tokenizer.model", "encoding/encoding_dsv4.py"}
        return str(write(tmp_path, byte_level()))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert len(open_checkpoint(None).tokenizer("someone/something", "v2")) == 330


def test_a_tokenizer_may_be_of_another_revision(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model(tiny)
    asked = []

    def fetch(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(model.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    options: dict[str, Any] = {"device": device, "num_blocks": 9, "enforce_eager": True}
    LLM("someone/something", revision="v1", **options)
    LLM("someone/something", revision="v1", tokenizer_revision="v2", **options)
    LLM(str(model.path), tokenizer="other/words", tokenizer_revision="v3", **options)
    LLM(str(model.path), tokenizer_revision="v4", **options)  # as revision= of a directory
    model_v1 = ("someone/something", "v1")
    assert asked == [model_v1, model_v1, ("someone/something", "v2"), ("other/words", "v3")]


def test_starting_imports_no_compiler() -> None:
    """transformers' AutoTokenizer does, which takes longer than all the rest. What the classes that
    everything needs import of themselves, as those of version 5.0 do, is not ours to say."""
    program = (
        "import json, sys\nfrom transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "before = set(sys.modules)\nfrom reprise import LLM\nLLM(device='cpu', num_blocks=9)\n"
        "print(json.dumps([name for name in ('torch._dynamo', 'torch.distributed.tensor',"
        " 'transformers.models.auto.tokenization_auto') if name in set(sys.modules) - before]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == []


def test_added_tokens_of_the_file_are_kept(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    found = load_tokenizer(write(tmp_path, tokenizer))
    ids = tokenizer.encode("a<think>b<eos>").ids
    assert found.encode("a<think>b<eos>") == ids
    assert found.decode(ids, skip_special_tokens=True) == "a<think>b"


TEMPLATES: list[Any] = [
    None, "{{ messages }}", {"default": "d", "tool_use": "t"}, {"tool_use": "t"}, {"rag": "r"},
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
@pytest.mark.parametrize(
    "named",
    [{}, {"eos_token": "<eos>"}, {"eos_token": "<eos>", "unk_token": "<user>", "image_token": "a",
     "additional_special_tokens": ["<user>"]}],
    ids=len,
)  # fmt: skip
def test_it_answers_as_transformers_does(
    tmp_path: Path, template: Any, named: dict[str, Any]
) -> None:
    config = dict(named)
    if isinstance(template, dict):
        config["chat_template"] = [{"name": n, "template": t} for n, t in template.items()]
    elif template is not None:
        config["chat_template"] = template
    found = load_tokenizer(write(tmp_path, byte_level(), **config))
    other = found.as_transformers()
    assert found.special_tokens_map == other.special_tokens_map
    assert found.eos_token == other.eos_token
    assert end_of_text_id(found) == end_of_text_id(other)
    for name in (None, "rag", "tool_use", "{{ other }}"):
        for tools in (None, [{"type": "function"}]):
            answers = []
            for each in (found, other):
                try:
                    answers.append(each.get_chat_template(name, tools))
                except ValueError:
                    answers.append(None)
            assert answers[0] == answers[1]
    for text in SAMPLES:
        ids = other.encode(text)
        assert found.encode(text) == ids
        assert found.decode(ids) == other.decode(ids)
        assert found.convert_ids_to_tokens(ids) == other.convert_ids_to_tokens(ids)
    for token in ("<eos>", "a", "no such token"):
        assert found.convert_tokens_to_ids(token) == other.convert_tokens_to_ids(token)
    assert found.convert_ids_to_tokens(5) == other.convert_ids_to_tokens(5)
    assert len(found) == len(other)
    # What is not answered here.
    assert found.all_special_ids == other.all_special_ids


def test_what_a_caller_sets_is_his_own(tmp_path: Path) -> None:
    """transformers keeps settings of a call in the tokenizer."""
    found = load_tokenizer(write(tmp_path, byte_level(), eos_token="<eos>", pad_token="<eos>"))
    expected = found.encode(CORPUS[0])
    assert len(expected) > 3
    other = found.as_transformers()
    assert len(other(CORPUS[0], truncation=True, max_length=3)["input_ids"]) == 3
    other([CORPUS[0], "a"], padding="max_length", max_length=100)
    other.add_tokens([CORPUS[0][:6]])
    assert found.encode(CORPUS[0]) == expected
    assert found.as_transformers() is other


def test_files_that_transformers_refuses(tmp_path: Path) -> None:
    """The engine needs nothing of it."""
    found = load_tokenizer(write(tmp_path, byte_level(), padding_side="above"))
    assert found.encode("a")
    with pytest.raises(ModelError, match="transformers refuses it"):
        found.as_transformers()


def test_long_texts_leave_other_threads_the_interpreter() -> None:
    """A step of the engine is to wait for no text; the library holds all threads for a single
    one."""
    tokenizer = load_tokenizer(DEMO_MODEL)
    library = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    text = "Once upon a time. <|im_end|> " * 10_000
    ids: list[int] = []
    begin = threading.Event()

    def encode() -> None:
        begin.wait()
        ids.extend(tokenizer.encode(text))
        assert tokenizer.decode(ids) == text

    thread = threading.Thread(target=encode)
    thread.start()
    began = last = time.monotonic()
    longest = 0.0
    begin.set()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert longest < (last - began) / 4
    assert ids == library.encode(text).ids
    assert (
        tokenizer.encode(text, add_special_tokens=False)
        == library.encode(text, add_special_tokens=False).ids
    )
    assert tokenizer.decode(ids, True) == library.decode(ids, skip_special_tokens=True)

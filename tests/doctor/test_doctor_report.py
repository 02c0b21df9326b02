"""``reprise doctor report``: complete, and without anything private."""

from __future__ import annotations

import json
import logging
import re
import shutil
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprise import LLM, SamplingParams
from reprise.doctor.report import bug_report, kept_log
from reprise.doctor.scrub import Scrubber, public_name
from reprise.errors import CapacityError

SECRET = "hush4711"
SMALL = {"num_blocks": 33, "max_num_seqs": 4, "max_num_batched_tokens": 16, "dtype": "float32"}
FLAGS = [
    part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home whose name is a secret."""
    made = tmp_path / f"home-{SECRET}"
    made.mkdir()
    monkeypatch.setenv("HOME", str(made))
    return made


@pytest.fixture
def model(home, tiny):
    """A tiny model in a directory below one whose name is a secret."""
    place = home / f"my {SECRET} models" / "tiny-model"
    shutil.copytree(tiny("qwen3").path, place)
    return place


def test_the_command_tells_all_that_a_bug_report_needs(invoke, device, model, tmp_path):
    path = tmp_path / "report.json"
    result = invoke(
        "doctor", "report", "--device", device, "--model", str(model), "--skip-tokenizer-init",
        "--graph-mode", "full", "--graph-verify", "canary:1", "--graph-buckets",
        "decode=4;mixed=16", *FLAGS, "-o", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = path.read_text()
    assert SECRET not in text
    assert SECRET not in result.stdout.replace(str(path), "")
    found = json.loads(text)
    assert found["versions"]["reprise"]
    assert found["device"]["platform"] == device
    assert found["config"]["model"] == "tiny-model"
    assert found["config"]["num_blocks"] == 33
    assert found["ops"]["paged_attention"]["chosen"]
    assert {"triton"} <= set(found["ops"]["paged_attention"]["implementations"])
    graphs = found["graphs"]
    assert graphs["plan"] == {"decode": "full", "mixed": "full"}
    assert graphs["canaries"] > 0
    assert graphs["canary_failures"] == 0
    for each in graphs["graphs"]:
        assert each["facts"]["padding: none"] in ("start", "family", "live")
    assert {"predicted", "actual", "note"} <= set(graphs["memory"])
    assert {"weights", "capture", "verify"} <= set(found["startup"]["spans"])
    assert found["steps"]["steps"] >= 1
    assert any("KV cache: 33 blocks" in each for each in found["log"])
    assert "failure" not in found


def test_prompts_are_not_in_the_report_of_an_engine_that_serves(home, model, device):
    llm = LLM(str(model), device=device, graph_mode="none", skip_tokenizer_init=True, **SMALL)
    prompt = [7, 3, 99, 4, 81, 5]
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0))
    text = json.dumps(bug_report(llm.engine))
    assert SECRET not in text
    for ids in (prompt, list(output.outputs[0].token_ids)):
        assert json.dumps(ids)[1:-1] not in text


def test_texts_are_not_in_the_report(device):
    llm = LLM(device=device, graph_mode="none", num_blocks=33, max_num_seqs=4)
    with kept_log() as log:
        llm.generate(f"{SECRET} once upon a time", SamplingParams(max_tokens=4))
        with pytest.raises(CapacityError) as caught:
            llm.generate([f"{SECRET} " * 900], SamplingParams(max_tokens=4))
    text = json.dumps(bug_report(llm.engine, failure=caught.value, log=log))
    assert "CapacityError" in text
    assert SECRET not in text


def test_an_engine_that_does_not_start_has_a_report_too(invoke, device, model):
    (model / "model.safetensors").write_bytes(b"nothing")
    result = invoke(
        "doctor", "report", "--device", device, "--model", str(model), "--skip-tokenizer-init",
        *FLAGS,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert SECRET not in result.stdout
    found = json.loads(result.stdout)
    assert "LoadError" in found["failure"]["error"]
    assert any("engine.py" in each for each in found["failure"]["traceback"])
    assert found["device"]["platform"] == device
    assert "graphs" not in found


def test_the_file_has_a_name_that_says_json(invoke):
    result = invoke("doctor", "report", "-o", "report.txt")
    assert result.exit_code == 2
    assert ".json" in result.stderr


def test_others_see_the_log_as_before():
    logger = logging.getLogger("reprise")
    level, seen = logger.level, []
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    logger.setLevel("WARNING")
    try:
        with kept_log() as lines:
            logger.info("quiet")
            logger.warning("loud")
        logger.info("gone")
        assert lines == ["INFO reprise: quiet", "WARNING reprise: loud"]
        assert [each.getMessage() for each in seen] == ["loud"]
        assert (logger.level, handler.level) == (logging.WARNING, logging.NOTSET)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("no /data/hush/model.safetensors: gone", "no <path>/model.safetensors: gone"),
        ("in '/srv/hush/x/'", "in '<path>'"),
        (r"C:\Users\hush\file.py failed", "<path>/file.py failed"),
        ("~/hush/x.bin", "<path>/x.bin"),
        ("bfloat16/float32 at 3/4 of tok/s", "bfloat16/float32 at 3/4 of tok/s"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("a / b", "a / b"),
    ],
)  # fmt: skip
def test_paths_in_texts(text, public):
    assert Scrubber().text(text) == public


def test_models_by_hub_id_or_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hush" / "mine").mkdir(parents=True)
    assert public_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert public_name("hush/mine") == "mine"
    assert public_name("./hush/none") == "none"
    assert public_name("a/hush/none") == "none"
    assert public_name(str(tmp_path / "hush" / "mine")) == "mine"
    assert Scrubber(["hush/mine"]).text("loading hush/mine now") == "loading mine now"


def test_users_and_machines_have_no_names(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "hush")
    monkeypatch.setattr("socket.gethostname", lambda: "box-17")
    scrubber = Scrubber()
    assert scrubber.text("torchinductor_hush on box-17") == "torchinductor_<user> on <host>"
    assert scrubber.text("hushed") == "hushed"
    assert scrubber.data({"hush": ["box-17", 3, None]}) == {"<user>": ["<host>", 3, None]}


NAMES = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=8)


@given(st.lists(NAMES, max_size=4), NAMES, st.sampled_from([" ", "'", '"', ": ", "(", "="]))
def test_no_directory_survives(parts, last, before):
    path = "/".join(["", *parts, SECRET, last])
    text = Scrubber().text(f"what{before}{path}")
    assert SECRET not in text
    assert text.startswith(f"what{before}")
    assert re.fullmatch(r"what.{1,2}<\w+>", text, re.S)

"""The benchmarks measure something, and their records are complete and consistent."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from typer.testing import CliRunner

from reprise.bench.presets import LATENCY, THROUGHPUT, ThroughputWork, model_names

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A directory that holds a config and nothing else."""
    path = tmp_path_factory.mktemp("config-only")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return str(path)


def bench(*arguments: str) -> dict:
    """The record that ``reprise bench ARGUMENTS --json`` prints."""
    from reprise.cli.app import app

    result = CliRunner().invoke(app, ["bench", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    record = json.loads(result.stdout)
    assert {"reprise", "torch", "triton", "transformers", "python"} == set(record["versions"])
    for name in ("date", "command", "model", "device", "device_name", "dtype"):
        assert record[name]
    return record


def dummy(model: str, device: str) -> tuple[str, ...]:
    return "--model", model, "--load-format", "dummy", "--device", device


@pytest.mark.floor
def test_latency(model, device):
    record = bench(
        "latency", *dummy(model, device), "--batch-size", "1,3", "--input-len", "20,40",
        "--output-lens", "4,36", "--repeats", "2", "--num-blocks", "64",
    )  # fmt: skip
    assert record["engine"]["num_blocks"] == 64
    assert record["engine"]["enable_prefix_caching"] is False
    assert record["graphs"]["quarantined"] == 0
    assert record["graphs"]["captured"] == record["graphs"]["verified"]
    assert record["floor"]["copy_tb_per_s"] > 0
    assert record["floor"]["read_tb_per_s"] > 0
    assert record["floor"]["weight_bytes"] == record["floor"]["decode_weight_bytes"]
    shapes = [(each["batch_size"], each["input_len"]) for each in record["results"]]
    assert shapes == [(1, 20), (1, 40), (3, 20), (3, 40)]
    # A difference of two times, of which a busy machine may have made either longer.
    assert any(0 < each["floor_ms"] < each["ms_per_step"] for each in record["results"])
    for each in record["results"]:
        assert each["output_lens"] == [4, 36]
        assert each["floor_ms"] > 0
        low, high = min(each["ms_per_step_all"]), max(each["ms_per_step_all"])
        assert low <= each["ms_per_step"] <= high
        assert len(each["ms_per_step_all"]) == 2
        rate = each["batch_size"] * 1e3 / each["ms_per_step"]
        assert each["tokens_per_s"] == pytest.approx(rate, rel=0.01)
        rate = each["batch_size"] * each["input_len"] * 1e3 / each["first_token_ms"]
        assert each["prefill_tokens_per_s"] == pytest.approx(rate, rel=0.01)
        assert 0 < each["prefill_share_of_matmul_rate"] < 1


@pytest.mark.parametrize(("chance", "tokens"), [(1.0, 4), (0.0, 1)])
def test_synthetic_drafts_are_called_so(model, device, chance, tokens):
    from reprise.cli.app import app

    arguments = [
        "latency", *dummy(model, device), "--input-len", "20", "--output-lens", "5,37",
        "--repeats", "1", "--max-num-seqs", "4", "--synthetic-acceptance", str(chance),
    ]  # fmt: skip
    record = bench(*arguments)
    assert record["synthetic_acceptance"] == chance
    assert record["engine"]["speculative_config"]["method"] == "synthetic"
    (result,) = record["results"]
    assert result["tokens_per_step"] == tokens
    rate = tokens * 1e3 / result["ms_per_step"]
    assert result["tokens_per_s"] == pytest.approx(rate, rel=0.01)
    shown = CliRunner().invoke(app, ["bench", *arguments])
    assert "SYNTHETIC" in shown.stdout
    assert "tok/step" in shown.stdout


def test_throughput(model, device):
    record = bench(
        "throughput", *dummy(model, device), "--num-prompts", "6", "--input-len-range", "4:30",
        "--output-len-range", "3:9", "--repeats", "1", "--seed", "5",
    )  # fmt: skip
    assert record["requests"] == 6
    assert 6 * 4 <= record["input_tokens"] <= 6 * 30
    assert 6 * 3 <= record["output_tokens"] <= 6 * 9
    rate = record["output_tokens"] / record["seconds"]
    assert record["output_tokens_per_s"] == pytest.approx(rate, rel=0.05)
    assert record["preemptions"] == record["waiting"] == 0


def test_throughput_of_replicas(model, device):
    record = bench(
        "throughput", *dummy(model, device), "--num-prompts", "6", "--input-len-range", "4:4",
        "--output-len-range", "3:3", "--repeats", "1", "--data-parallel-size", "2",
    )  # fmt: skip
    assert record["data_parallel_size"] == 2
    assert [each["output_tokens"] for each in record["replicas"]] == [9, 9]
    rate = record["output_tokens"] / record["seconds"]
    assert record["output_tokens_per_s"] == pytest.approx(rate, rel=0.05)


def test_startup(model, device):
    record = bench("startup", *dummy(model, device), "--repeats", "1")
    parts = record["parts"]
    assert parts["import"] > 0.1
    assert parts["weights"] > 0
    assert parts["tokenizer"] == 0
    assert all(each >= 0 for each in parts.values())
    assert sum(parts.values()) == pytest.approx(record["first_token_seconds"], abs=0.01)
    assert record["ready_seconds"] < record["first_token_seconds"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ('{"error": "no config.json here"}', "no config.json here"),
        ("", "status 3 before it was ready: it broke"),
        ("noise, no record", "status 3"),
    ],
)
def test_startup_reports_why_the_engine_did_not_start(monkeypatch, output, message):
    from reprise.bench import startup
    from reprise.errors import RepriseError

    child = subprocess.CompletedProcess([], 3, stdout=output, stderr="it broke\n")
    monkeypatch.setattr(startup.subprocess, "run", lambda *args, **kwargs: child)
    with pytest.raises(RepriseError, match=message):
        startup.startup("anything", {}, repeats=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input-len", "600"), "holds 512"),
        (("--batch-size", "300"), "--max-num-seqs=256"),
        (("--output-lens", "9,3"), "shorter first"),
    ],
)
def test_requests_that_do_not_fit_are_refused(model, device, arguments, message):
    from reprise.cli.app import app

    result = CliRunner().invoke(app, ["bench", "latency", *dummy(model, device), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (("latency", "--batch-size", "1,2", "--output-lens", "2,4"), 2 * (1 + 3 * 2)),
        (("throughput", "--num-prompts", "2", "--input-len-range", "4:4",
          "--output-len-range", "2:2"), 1 + 2),
        (("startup",), 2),
    ],
    ids=["latency", "throughput", "startup"],
)  # fmt: skip
def test_runs_are_counted_on_a_terminal(model, device, arguments, runs, monkeypatch):
    from reprise import progress
    from reprise.bench import startup
    from reprise.cli.app import app

    # What a process of its own says is looked at elsewhere.
    said = {"parts": {}, "facts": {"startup_seconds": 1.0}, "ready": 1.0, "first_token": 2.0}
    monkeypatch.setattr(startup, "_start", lambda *args: said)
    monkeypatch.setattr(progress, "SHOW_AFTER_SECONDS", 0.0)
    # Rich takes every stream for a terminal then.
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "160"}
    command = ["bench", *arguments, *dummy(model, device), "--repeats", "2", "--json"]
    result = CliRunner().invoke(app, command, env=terminal)
    assert result.exit_code == 0, result.stderr
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.stderr)
    assert arguments[0] in plain
    assert f"{runs}/{runs}" in plain
    assert json.loads(result.stdout)["benchmark"] == arguments[0]


def test_preset_configs_are_models_that_can_be_built():
    import torch

    from reprise import models
    from reprise.bench.floor import weights_of_a_token
    from reprise.bench.presets import CONFIGS
    from reprise.layers import Build
    from reprise.loading import open_checkpoint

    sizes = {}
    for name in model_names():
        config = open_checkpoint(str(CONFIGS / name), config_only=True).config
        model = models.build(config, Build(torch.bfloat16, torch.device("meta"), 64))
        found = sum(each.numel() for each in model.parameters())
        if getattr(config, "quantization_config", None) is None:
            sizes[name] = found
        else:
            # Scales and zeros are no numbers of the model, and a word has eight.
            of_a_token = {"deepseek-v4-flash": 12_704_808_960}
            assert weights_of_a_token(model) == of_a_token.get(name, 6_945_767_424)
    assert sizes == {
        "llama-3.2-1b": 1_235_814_400,
        "qwen3-0.6b": 596_049_920,
        "qwen3-235b-a22b": 235_093_634_560,
        "qwen3-30b-a3b": 30_532_122_624,
        "qwen3-8b": 8_190_735_360,
        "qwen3-next-80b-a3b": 79_674_391_296,
        "qwen3.5-35b-a3b": 34_660_610_688,
        "qwen3.5-4b": 4_205_751_296,
        "smollm2-135m": 134_515_008,
    }


def test_named_workloads_use_known_models():
    for each in (*LATENCY.values(), *THROUGHPUT.values()):
        assert each.model in model_names()


def test_request_lengths_depend_on_the_seed_alone():
    from reprise.bench.throughput import lengths

    work = ThroughputWork(num_prompts=1000, input_len_range=(10, 12), output_len_range=(1, 2))
    assert lengths(work, 3) == lengths(work, 3) != lengths(work, 4)
    assert set(lengths(work, 3)[0]) == {10, 11, 12}
    assert set(lengths(work, 3)[1]) == {1, 2}


def test_the_floor_is_the_fastest_that_memory_was_seen_to_be():
    from reprise.bench.floor import Floor

    assert Floor(2.0, 3.0, 1.0).bytes_per_second == 3.0
    assert Floor(3.0, 2.0, 1.0).bytes_per_second == 3.0


@pytest.mark.floor
def test_reading_beats_the_floor_by_nothing(platform):
    """What the weights' bytes take to be read, by whatever reads them, is no less than the floor.

    A copy alone is no such bound: a processor reads faster than it copies.
    """
    import torch

    from reprise.bench.floor import _seconds, measure_floor

    weights = torch.ones(1 << 24, dtype=torch.float32, device=platform.device)

    def share() -> float:
        with torch.inference_mode():
            floor = measure_floor(platform, torch.float32, weights.nbytes)
            taken = _seconds(platform, weights.sum)
        return taken * floor.bytes_per_second / weights.nbytes

    # On a busy machine either measurement may have met the better moment, but not each time.
    assert any(share() >= 0.6 for _ in range(5))


@pytest.mark.parametrize("columns", [80, 160])
def test_tables_for_people(model, device, columns):
    from reprise.cli.app import app

    result = CliRunner().invoke(
        app,
        ["bench", "latency", *dummy(model, device), "--output-lens", "2,4", "--repeats", "1"],
        env={"COLUMNS": str(columns)},
    )
    assert result.exit_code == 0, result.stderr
    tables = [each for each in result.stdout.splitlines() if "─" in each or "ms" in each]
    assert tables
    assert max(map(len, tables)) <= columns
    for heading in ("ms/step", "x floor", "out tok/s", "first token ms", "prefill share"):
        assert heading in result.stdout
    assert "medians of 1" in result.stdout


def test_synthetic_drafts_of_a_workload_are_its_heads_own(monkeypatch):
    """The chance replaces what counts, not the head whose passes are measured."""
    from reprise.bench import latency
    from reprise.bench.presets import LATENCY
    from reprise.cli.app import app

    seen = {}

    class Enough(Exception):
        pass

    def measure(work, engine, *rest):
        seen.update({**work.engine, **engine})
        raise Enough

    monkeypatch.setattr(latency, "latency", measure)
    result = CliRunner().invoke(
        app,
        ["bench", "latency", "--workload", "8b-eagle3-bs1", "--synthetic-acceptance", "0.5"],
    )
    assert isinstance(result.exception, Enough)
    own = LATENCY["8b-eagle3-bs1"].engine["speculative_config"]
    assert seen["speculative_config"] == {**own, "synthetic_acceptance": 0.5}


def test_heads_of_workloads_fit_their_targets():
    from reprise.bench.presets import CONFIGS, LATENCY
    from reprise.cli.app import app

    heads = {
        (each.model, json.dumps(each.engine["speculative_config"]))
        for each in LATENCY.values()
        if "speculative_config" in each.engine
    }
    assert heads
    for model, config in heads:
        options = ["--model", str(CONFIGS / model), "--speculative-config", config]
        command = ["doctor", "memory", *options, "--memory", "160", "--json"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        names = [each["name"] for each in json.loads(result.stdout)["weights"]]
        assert "draft head.fc.weight" in names


def test_experts_of_several_ranks_are_not_counted():
    """A step of one rank alone would wait for the others for ever."""
    from types import SimpleNamespace

    from reprise.bench.experts import count_experts_hit

    runner = SimpleNamespace(model=SimpleNamespace(routed=True))
    engine = SimpleNamespace(runner=runner, config=SimpleNamespace(tensor_parallel_size=2))
    assert count_experts_hit(engine, [[1]]) is None

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from toy import Toy

from reprise.graphs import Segment, compiled, keep_compiled_code
from reprise.shape import StepShape
from reprise.testing import faults


@pytest.fixture(scope="module")
def cache(tmp_path_factory, platform):
    """An empty one, in place of one that cannot be written."""
    reason = platform.compiler_missing()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        file = tmp_path_factory.mktemp("inductor") / "file"
        file.touch()
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{file}/below")
        keep_compiled_code()
        yield


def started(platform, make_runner, fault=None):
    torch._dynamo.reset()
    counters.clear()
    toy = Toy(platform, layers=3)
    broken = faults.inject(fault, toy.ops, "rotary_cache") if fault else contextlib.nullcontext()
    with broken:
        runner = make_runner(toy, "compiled", decode=(2, 4), mixed=())
        runner.captures.capture_all()
    return toy, runner


def test_pieces_are_compiled_captured_and_verified(cache, platform, make_runner):
    toy, runner = started(platform, make_runner)
    report = runner.report()
    assert [each.executor for each in report.graphs] == ["compiled"] * 2, report.quarantined
    assert all(each.verified for each in report.graphs)
    assert [(each.segments, each.breaks) for each in report.graphs] == [(4, 3)] * 2
    # Layers are compiled once for all of them; so are numbers of tokens.
    pieces = counters["inductor"]["fxgraph_cache_miss"]
    assert 3 <= pieces <= 6
    graph = runner.bucket_graphs.holding(StepShape.decode(4)).graph
    assert [str(each) for each in graph.steps[2].calls] == [
        "linear_add #0", "rms_norm #1", "silu_and_mul #0", "linear_add #1", "rms_norm #2",
        "rotary_cache #1",
    ]  # fmt: skip
    assert isinstance(graph.steps[2], Segment)
    for shape in (StepShape.decode(2), StepShape.decode(3)):
        toy.fill(shape, 7)
        expected = toy.eager(shape)
        torch.testing.assert_close(runner.run(shape), expected, rtol=2e-2, atol=2e-2)

    # A second start finds everything on disk. This one has a bad kernel.
    toy, runner = started(platform, make_runner, fault="stale_scalar")
    for info in runner.report().graphs:
        assert info.quarantined.startswith("compiled: probe 'longest context'")
        assert "rotary_cache #0" in info.quarantined
        assert info.executor == "none"
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] >= pieces


SCRIPT = """
import os, sys, reprise
llm = reprise.LLM(device="cpu", num_blocks=9, block_size=8, max_num_seqs=1, graph_mode=sys.argv[1],
                  graph_buckets="decode=1;mixed=8")
tokens = llm.generate("1 + 1 =", reprise.SamplingParams(temperature=0, max_tokens=2))
print([each.executor for each in llm.graph_report().graphs], len(tokens[0].outputs[0].token_ids))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


def start(mode, **changes):
    """In a process of its own: transformers has the compiler choose a directory when imported."""
    variables = {k: v for k, v in os.environ.items() if k not in CACHE_VARIABLES} | changes
    command = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return *done.stdout.splitlines(), done.stderr


CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME")


def test_compiled_code_is_kept_in_the_users_cache(tmp_path):
    (_, chosen, _) = start("none", XDG_CACHE_HOME=str(tmp_path))
    assert chosen == f"{tmp_path}/reprise/inductor"


@pytest.mark.parametrize(
    "variables",
    [["HOME", "TORCHINDUCTOR_CACHE_DIR"],
     pytest.param(["XDG_CACHE_HOME"], marks=pytest.mark.long)],
)  # fmt: skip
def test_a_cache_that_cannot_be_written_costs_no_graph(tmp_path, variables):
    file = tmp_path / "file"
    file.touch()
    executors, chosen, log = start("full", **dict.fromkeys(variables, f"{file}/below"))
    assert executors == "['full', 'full'] 2"
    assert f"{file} is not a directory (TORCHINDUCTOR_CACHE_DIR chooses)" in log
    assert ("(TRITON_CACHE_DIR chooses)" in log) == ("HOME" in variables)
    assert not os.path.exists(chosen), "the temporary directory is gone with its process"


def test_a_choice_that_can_be_written_stays(tmp_path, monkeypatch):
    mine = str(tmp_path / "mine")
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, mine)
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == os.environ["TRITON_CACHE_DIR"] == mine
    assert not os.path.exists(mine), "it is made when something is compiled"


def test_engines_of_a_process_do_not_count_against_each_other(cache, monkeypatch):
    """What is compiled for one model is no recompilation of another of its class."""
    monkeypatch.setattr(compiled, "RECOMPILATIONS", 1)
    for features in (3, 4, 5):
        model = torch.nn.Linear(features, 2)
        x = torch.randn(6, features)
        torch.testing.assert_close(compiled.compile_model(model)(x), model(x))

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from toy import Toy

from reprise.graphs import Segment, StepShape
from reprise.testing import faults


@pytest.fixture(scope="module")
def cache(tmp_path_factory, platform):
    reason = platform.compiler_missing()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def started(platform, make_runner, fault=None):
    torch._dynamo.reset()
    counters.clear()
    toy = Toy(platform, layers=3)
    broken = faults.inject(fault, toy.ops, "rotary_cache") if fault else contextlib.nullcontext()
    with broken:
        runner = make_runner(toy, "compiled", decode=(2, 4), mixed=())
        runner.capture_all()
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
    graph = runner._cell_for(StepShape.decode(4)).graph
    assert [str(each) for each in graph.steps[2].calls] == [
        "fused_add_rms_norm #0", "silu_and_mul #0", "fused_add_rms_norm #1", "rotary_cache #1",
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


def test_compiled_code_is_kept_in_the_users_cache(tmp_path):
    """In a process of its own: transformers has the compiler choose a directory when imported."""
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    variables.pop("TORCHINDUCTOR_CACHE_DIR", None)
    script = (
        "import os, reprise; reprise.LLM(device='cpu', num_blocks=9, graph_mode='none');"
        "print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )

    def chosen(**more):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=variables | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert chosen() == f"{tmp_path}/reprise/inductor"
    assert chosen(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "mine")) == str(tmp_path / "mine")

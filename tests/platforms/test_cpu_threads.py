"""CPU threads: their number follows the process's limits, and a busy machine slows them little."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from reprise.cpu_limits import usable_cpus
from reprise.openmp import CHOICES, let_threads_sleep

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def groups(tmp_path):
    """Make a tree of control groups: ``groups("0::/a/b", {"a/b/cpu.max": "..."})``."""

    def make(membership, files):
        (tmp_path / "membership").write_text(membership + "\n")
        for name, text in files.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return usable_cpus(tmp_path / "root", tmp_path / "membership")

    return make


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/a/b", {"a/b/cpu.max": "50000 100000"}),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}),
        ("0::/", {"cpu.max": "100000 100000"}),
        ("0::/docker/of-the-host", {"cpu.max": "100000 100000"}),
        ("0::/x", {"unified/x/cpu.max": "100000 100000"}),
        ("4:cpu,cpuacct:/d", {"cpu,cpuacct/d/cpu.cfs_quota_us": "100000",
                              "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}),
        ("4:cpuacct,cpu:/d", {"cpu/d/cpu.cfs_quota_us": "20000",
                              "cpu/d/cpu.cfs_period_us": "100000"}),
    ],
)  # fmt: skip
def test_a_share_of_one_cpu_or_less_is_one_thread(groups, membership, files, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    count, reason = groups(membership, files)
    assert count == 1
    assert "control group" in reason


def test_parts_of_a_cpu_count_and_no_limit_leaves_all(groups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert groups("0::/a", {"a/cpu.max": "250000 100000"})[0] == 3
    assert groups("0::/a", {"a/cpu.max": "max 100000"})[0] == 8
    assert groups("0::/a", {"a/cpu.max": "9900000 100000"})[0] == 8
    assert groups("0::/a", {"a/cpu.max": "of another kind altogether"})[0] == 8
    assert groups("3:cpu:/v1", {"cpu/v1/cpu.cfs_quota_us": "-1",
                                "cpu/v1/cpu.cfs_period_us": "100000"})[0] == 8  # fmt: skip


def test_affinity_counts(groups):
    assert groups("", {})[0] == HERE


@pytest.mark.parametrize("name", CHOICES)
def test_what_the_user_chose_stays(name):
    environment = {name: "7"}
    assert f"{name}=7" in let_threads_sleep(environment, loaded=False)
    assert environment == {name: "7"}


def test_where_torch_came_first_the_remedy_is_said():
    environment: dict[str, str] = {}
    assert "import reprise before torch" in let_threads_sleep(environment, loaded=True)
    assert environment == {}


LOGGED = """
import logging, os
logging.basicConfig(level="INFO")
from reprise import platforms
platform = platforms.resolve("cpu")
platform.activate()
platform.activate()
import torch
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("threads", [None, "1"])
def test_one_line_says_how_many_threads_and_why(threads):
    environment = _free_environment()
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    done = subprocess.run(
        [sys.executable, "-c", LOGGED], env=environment, capture_output=True, text=True
    )
    (line,) = (each for each in done.stderr.splitlines() if "CPU threads" in each)
    assert f"CPU threads: {done.stdout.strip()} (" in line
    assert "asleep while they wait" in line
    if threads is None:
        assert 1 <= int(done.stdout) <= HERE
    else:
        assert done.stdout.strip() == threads
        assert f"OMP_NUM_THREADS={threads}" in line


DECODE = """
import sys, time
from reprise import LLM, SamplingParams
llm = LLM(num_blocks=99, max_num_seqs=1, skip_tokenizer_init=True, device="cpu")
params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
for _ in sys.stdin:
    began = time.perf_counter()
    llm.generate([[5, 6, 7]], params, use_tqdm=False)
    print(time.perf_counter() - began, flush=True)
"""


@pytest.mark.skipif((HERE or 1) < 2, reason="needs threads that wait for each other")
def test_a_busy_machine_slows_decoding_no_more_than_it_must():
    child = subprocess.Popen(
        [sys.executable, "-c", DECODE], env=_free_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def seconds() -> float:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    def pause(signal_number: signal.Signals) -> None:
        for each in spinning:
            each.send_signal(signal_number)
        time.sleep(0.1)

    spinning: list[subprocess.Popen[bytes]] = []
    slower: list[float] = []
    try:
        seconds()
        spinning += [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(HERE or 1)
        ]
        # What else runs here may come and go: both times are of one moment, and threads that
        # waited for each other would be slow in all of them.
        for _ in range(20):
            pause(signal.SIGSTOP)
            idle = min(seconds() for _ in range(2))
            pause(signal.SIGCONT)
            slower.append(min(seconds() for _ in range(2)) / idle)
            if slower[-1] <= 3:
                break
    finally:
        for each in (*spinning, child):
            each.kill()
            each.wait()
    assert min(slower) <= 3, slower


def _free_environment() -> dict[str, str]:
    """Of a user who has chosen nothing."""
    chosen = ("OMP_NUM_THREADS", *CHOICES)
    return {name: value for name, value in os.environ.items() if name not in chosen}

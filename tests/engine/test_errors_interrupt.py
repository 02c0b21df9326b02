"""Ctrl-C at any line of the engine: the next request gets what it would have got anyway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import warm
from helpers import TinyModels, assert_idle, make_llm, random_ids, token_ids

import reprise
from reprise import SamplingParams
from reprise.ops import put_off

SOURCE = Path(reprise.__file__).parent
Line = tuple[str, int]

PROMPTS = [random_ids(1, 14), random_ids(2, 7), random_ids(3, 15)]
PARAMS = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=6, presence_penalty=0.3),
    SamplingParams(temperature=0, max_tokens=5, n=2, min_tokens=3, stop_token_ids=[1]),
    SamplingParams(temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=0),
]
NUM_LINES = 120
"""Of some 400, taken at random; all of them take half a minute."""
CHECK_EVERY = 8
"""Interrupted runs after which an undisturbed one is compared."""


class Interruption:
    """Traces the engine's lines within a ``with`` block; raises KeyboardInterrupt at one."""

    def __init__(self, at: Line | None = None, visit: int = 0) -> None:
        self.visits: dict[Line, int] = defaultdict(int)
        self.at, self.visit = at, visit

    def __enter__(self) -> Interruption:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(str(SOURCE)):
            return None
        package = Path(file).relative_to(SOURCE).parts[0]
        return self._line if package in ("engine", "cache", "llm.py") else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            if line == self.at and self.visits[line] == self.visit:
                sys.settrace(None)
                raise KeyboardInterrupt
            self.visits[line] += 1
        return self._line


def test_at_any_line(tiny: TinyModels, device: str) -> None:
    # A cache so small that requests are preempted.
    llm = make_llm(
        tiny("llama", num_hidden_layers=1), device, block_size=8, num_blocks=7, max_model_len=40
    )

    def run() -> list[list[int]]:
        return token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))

    expected = run()
    llm.reset_prefix_cache()
    with Interruption() as uninterrupted:
        assert run() == expected
    assert llm.stats().scheduler.total_preemptions > 0
    visits = uninterrupted.visits
    assert len(visits) > 250

    random = Random(0)
    lines = random.sample(sorted(visits), NUM_LINES)
    for first in range(0, len(lines), CHECK_EVERY):
        some = lines[first : first + CHECK_EVERY]
        for line in some:
            with Interruption(line, random.randrange(visits[line])) as interruption:
                try:
                    run()
                except KeyboardInterrupt:
                    pass
                else:  # the schedule differed: nothing was interrupted
                    assert interruption.visits[line] < visits[line]
            assert_idle(llm)
        assert run() == expected, f"after interrupts at {some}"
        assert_idle(llm)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT between processes")
def test_by_a_signal(tiny: TinyModels, device: str) -> None:
    process = subprocess.Popen(
        [sys.executable, warm.INTERRUPTED, str(tiny("llama").path), device],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE.parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "generating\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out.splitlines() == ["interrupted", "same tokens"], errors
    assert process.returncode == 0


def test_an_interrupt_while_a_block_of_ops_opens(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would close it, and no op behind it would be computed."""
    llm = make_llm(tiny("qwen3"), device)
    expected = token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    opens = put_off.together.__enter__

    def interrupted(block: put_off.together) -> None:
        opens(block)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(put_off.together, "__enter__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert not put_off.here.open
    assert token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected

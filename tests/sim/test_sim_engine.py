"""Engines on the device: the CPU's tokens, no races, and each wait of the engine is needed."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import pytest
from helpers import generate, greedy, random_ids
from reprise_sim import device as sim

from reprise import LLM
from reprise.errors import RepriseError

OPTIONS = {
    "max_num_seqs": 4, "num_blocks": 65, "block_size": 8, "max_num_batched_tokens": 32,
    "skip_tokenizer_init": True, "dtype": "float32",
}  # fmt: skip
BUCKETS = "decode=1,2,4;mixed=16,32"
PROMPTS = [random_ids(n, 3 + 6 * n) for n in range(1, 6)]


def tokens(model, device: str, count: int = 10, **options: Any) -> list[list[int]]:
    llm = LLM(str(model.path), device=device, **{**OPTIONS, **options})
    return [list(each) for each in generate(llm, PROMPTS, greedy(count))]


@pytest.mark.parametrize(
    ("family", "graphs"),
    [
        ("qwen3", "none"),
        ("qwen3", "full"),
        ("llama", "breakable"),
        ("qwen3_next", "full"),
        pytest.param("qwen3_moe", "full", marks=pytest.mark.long),
        pytest.param("qwen3_5", "breakable", marks=pytest.mark.long),
    ],
)
def test_tokens_are_the_cpus(tiny, finder, family: str, graphs: str) -> None:
    model = tiny(family)
    expected = tokens(model, "cpu")
    got = tokens(model, "sim", graph_mode=graphs, graph_buckets=BUCKETS, graph_verify="canary:3")
    assert got == expected
    found = finder()
    assert not found, "\n".join(found)


def test_batch_invariant_tokens_are_the_cpus(tiny, finder) -> None:
    model = tiny("qwen3")
    expected = tokens(model, "cpu", batch_invariant=True)
    got = tokens(
        model, "sim", graph_mode="full", graph_buckets="decode=1,2,4", batch_invariant=True
    )
    assert got == expected
    found = finder()
    assert not found, "\n".join(found)


def test_two_engines_on_two_devices(tiny, finder) -> None:
    model = tiny("qwen3")
    expected = tokens(model, "cpu")
    found: dict[str, Any] = {}

    def run(device: str) -> None:
        try:
            found[device] = tokens(model, device, graph_mode="full", graph_buckets="decode=1,2,4")
        except Exception as error:
            found[device] = error

    threads = [threading.Thread(target=run, args=(each,)) for each in ("sim:0", "sim:1")]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
    assert found == {"sim:0": expected, "sim:1": expected}
    found = finder()
    assert not found, "\n".join(found)


@pytest.mark.parametrize("numbers", ["late", "negative", "lost"])
def test_memory_numbers_that_are_wrong(tiny, numbers: str) -> None:
    """What graphs take is then not known; the engine starts, and says so, or refuses by name."""
    model = tiny("qwen3")
    with sim.configured(numbers=numbers):
        got = tokens(model, "sim", graph_mode="full", graph_buckets="decode=1,2,4")
    assert got == tokens(model, "cpu")


def test_weights_belong_to_the_caller_again_when_they_are_taken(tiny, platform, finder) -> None:
    """Whatever stream changes them then."""
    from safetensors.torch import load_file

    model = tiny("qwen3")
    expected = tokens(model, "cpu")
    llm = LLM(str(model.path), device="sim", graph_mode="none", **OPTIONS)
    stored = load_file(str(model.path / "model.safetensors"))
    given = {name: each.to("sim") for name, each in stored.items()}
    llm.update_weights(list(given.items()))
    side = platform.stream()
    with platform.use_stream(side):
        for each in given.values():
            each.zero_()
    assert [list(each) for each in generate(llm, PROMPTS, greedy(10))] == expected
    found = finder()
    assert not found, "\n".join(found)


# ---- waits that are removed on purpose ------------------------------------------------------


class Hasty:
    """An event one of whose methods does nothing, where ``file`` calls it."""

    def __init__(self, event: Any, method: str, file: str) -> None:
        self._event, self._method, self._file = event, method, file

    def record(self, *streams: Any) -> None:
        if not self._left_out("record"):
            self._event.record(*streams)

    def synchronize(self) -> None:
        if not self._left_out("synchronize"):
            self._event.synchronize()

    def _left_out(self, method: str) -> bool:
        caller = sys._getframe(2).f_code.co_filename
        return method == self._method and caller.endswith(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)


def hasty_events(monkeypatch, platform, method: str, file: str) -> None:
    made = type(platform).event

    def event(self: Any, *, timing: bool = False) -> Any:
        return Hasty(made(self, timing=timing), method, file)

    monkeypatch.setattr(type(platform), "event", event)


def hasty_device(monkeypatch, platform, file: str) -> None:
    waits = type(platform).synchronize

    def synchronize(self: Any) -> None:
        if not sys._getframe(1).f_code.co_filename.endswith(file):
            waits(self)

    monkeypatch.setattr(type(platform), "synchronize", synchronize)


def careless_captures(monkeypatch, platform, before: bool) -> None:
    @contextlib.contextmanager
    def capture_stream(self: Any):
        outer = self.current_stream()
        if not before:
            self._capture_stream.wait_stream(outer)
        with self.use_stream(self._capture_stream):
            yield self._capture_stream
        if before:
            outer.wait_stream(self._capture_stream)

    monkeypatch.setattr(type(platform), "capture_stream", capture_stream)


REMOVED = {
    "the loader's, for its copies": (hasty_device, "loading/transfer.py"),
    "a lane's, for its buffer": (hasty_events, "synchronize", "loading/transfer.py"),
    "a lane's record of its copy": (hasty_events, "record", "loading/transfer.py"),
    "a step's, for its tokens": (hasty_events, "synchronize", "runner/output.py"),
    "a step's record of its tokens": (hasty_events, "record", "runner/output.py"),
    "a step's record of its inputs": (hasty_events, "record", "runner/arena.py"),
    "a comparison's, for its verdict": (hasty_events, "synchronize", "graphs/verify.py"),
    "a comparison's record of its verdict": (hasty_events, "record", "graphs/verify.py"),
    "a capture's, for what was submitted before": (careless_captures, True),
    "what follows a capture, for it": (careless_captures, False),
}
RECORDS = [each for each in REMOVED if "record" in each]
"""Noticed as the waits for them are."""


@pytest.mark.parametrize(
    "which",
    [pytest.param(each, marks=[pytest.mark.long] * (each in RECORDS)) for each in REMOVED],
)
def test_each_wait_of_the_engine_is_needed(tiny, platform, finder, monkeypatch, which: str) -> None:
    model = tiny("qwen3")
    expected = tokens(model, "cpu")
    remove, *arguments = REMOVED[which]
    remove(monkeypatch, platform, *arguments)
    shown = []
    try:
        llm = LLM(
            str(model.path), device="sim", graph_mode="full", graph_buckets="decode=1,2,4",
            **OPTIONS,
        )  # fmt: skip
        quarantined = [each for each in llm.graph_report().graphs if each.quarantined is not None]
        shown += [f"{each.name}: {each.quarantined}" for each in quarantined]
        if [list(each) for each in generate(llm, PROMPTS, greedy(10))] != expected:
            shown.append("other tokens")
    except (RepriseError, RuntimeError, ValueError, IndexError, OverflowError) as error:
        shown.append(repr(error))
    shown += finder()
    assert shown, f"without {which} nothing shows"

"""Each example runs as its reader would run it, and says what it should."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

SAID = {
    "basic": [r"Prompt:    '47 \+ 38 ='\nCompleted: ' 85'"],
    "chat": [r"<\|im_start\|>assistant\\n'\nAnswer: 'Once upon", r"Prompt: 'system: You are"],
    "async_llm_streaming": [r"12 \+ 30 = 42\n\[stop\]", r"Once upon a time,.*\n", r"\[length\]"],
    "prefix_caching": ["32 of 4. prompt tokens", "Generated answers are the same: True"],
    "reproducibility": ["'47 \\+ 38 =' -> ' 85'", "Alone and in a batch, the same: True"],
    "context_extension": [r"Prompt: 20\d\d tokens of 8192", r"Answer: '.{20}"],
    "metrics": [
        r"reprise:num_requests_running \(gauge\) = 0",
        r"reprise:generation_tokens \(counter\) = \d+",
        r"reprise:time_to_first_token_seconds \(histogram\)\n    sum = .*\n    count = 4",
    ],
}


@pytest.mark.parametrize("name", SAID)
def test_it_says_what_it_should(
    name: str, device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("examples take the best device; text differs with its rounding")
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    for each in SAID[name]:
        assert re.search(each, said), said


def test_all_of_them_are_run() -> None:
    assert sorted(SAID) == sorted(each.stem for each in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SAID)
def test_it_uses_public_names_alone(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    modules = {each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)}
    assert modules <= {"reprise", "reprise.sampling_params", "reprise.metrics"}
    assert ast.get_docstring(tree)

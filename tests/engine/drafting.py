"""What drafts must have done, reckoned from the text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from helpers import greedy

from reprise import LLM, SamplingParams

Propose = Callable[[list[int]], list[int]]
"""The tokens that are drafted behind a text."""
LONG = greedy(200)
EXECUTORS: dict[str, dict[str, Any]] = {
    "eager": {"graph_mode": "none"},
    "full": {"graph_mode": "full", "graph_buckets": "decode=2,4;mixed=32"},
    "breakable": {"graph_mode": "breakable", "graph_buckets": "decode=4;mixed=16,64"},
}
"""Graphs of what drafts and of the target."""
_NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def metrics(llm: LLM) -> dict[str, float]:
    found = llm.engine.metrics()
    return {
        each.name.removeprefix("reprise:"): each.value for each in found if hasattr(each, "value")
    }


def rate(llm: LLM) -> float:
    """Of the drafted tokens, how many counted."""
    found = metrics(llm)
    return found["spec_decode_num_accepted_tokens"] / found["spec_decode_num_draft_tokens"]


def offline(prompt: list[int], output: list[int], propose: Propose) -> tuple[int, int, int]:
    """Drafts, drafted and accepted tokens of a text, reckoned from the text alone."""
    drafts = drafted = accepted = 0
    done = 1  # the prompt's step drew it
    while done < len(output):
        found = propose([*prompt, *output[:done]])
        right = 0
        while right < len(found) and done + right < len(output) - 1 and (
            found[right] == output[done + right]
        ):  # fmt: skip
            right += 1
        # What the last step of a text accepts the caller cannot see.
        if done + right >= len(output) - 1:
            return drafts, drafted, accepted
        drafts, drafted = drafts + bool(found), drafted + len(found)
        accepted += right
        done += right + 1
    return drafts, drafted, accepted


def check_counters(
    llm: LLM, prompts: Sequence[list[int]], propose: Propose, accepted: int,
    params: SamplingParams = LONG,
) -> None:  # fmt: skip
    """The engine's counters are those of its texts, one after the other; more than so many drafts
    count."""
    engine, total = llm.engine, 0.0
    for prompt in prompts:
        before = metrics(llm)
        group = engine.add("a", prompt, params)
        while group.completions[0].request.num_output_tokens < 60:
            engine.step()
        output = list(group.completions[0].request.output_token_ids)
        now = metrics(llm)
        engine.abort(["a"])
        while engine.has_work:
            engine.step()
        got = [now[f"spec_decode_{each}"] - before[f"spec_decode_{each}"] for each in _NAMES]
        # One more token than the last step brought: so that it is not the text's last.
        assert got == list(offline(prompt, [*output, -1], propose))
        total += got[2]
    assert total > accepted, "some drafts count"

"""Text that appears in the terminal while it is generated."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from reprise import early
from reprise.cli.logs import console

if TYPE_CHECKING:
    from rich.live import Live

    from reprise.engine import CompletionGroup, Engine
    from reprise.llm import LLM
    from reprise.outputs import RequestOutput
    from reprise.sampling_params import SamplingParams

# A model may emit any character; those that steer a terminal are left out.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_ids = itertools.count()


def load(options: Mapping[str, Any]) -> LLM:
    """Import the engine, which takes seconds, and load a model."""
    early.begin(options)
    with _spinner() if sys.stderr.isatty() else contextlib.nullcontext():
        from reprise.llm import LLM

        return LLM(**options)


def _spinner() -> Live:
    from rich.live import Live
    from rich.spinner import Spinner

    # Drawn seldom, and out of the way: the bars of loading and downloads share its line.
    return Live(
        Spinner("dots", "starting", style="status.spinner"), console=console(),
        refresh_per_second=1, transient=True, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip


def stream(llm: LLM, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
    """Generate; the iterator yields what there is so far after every step that added to it.

    Leaving the iteration early aborts the request.

    Raises:
        RepriseError: The prompt or a parameter is invalid; raised before the iteration.
        NonFiniteError: The model gave no numbers; raised by the iteration.
    """
    group = llm.engine.add(f"stream-{next(_ids)}", prompt, params)
    return _outputs(llm.engine, group)


def _outputs(engine: Engine, group: CompletionGroup) -> Iterator[RequestOutput]:
    try:
        while not group.finished:
            if group in engine.step():
                yield group.output()
        if group.error is not None:
            raise group.error
    finally:
        engine.abort([group.request_id])
        while engine.has_work:
            engine.step()


class Writer:
    """Prints a growing text, only the new part each time."""

    def __init__(self) -> None:
        self.text = ""
        """What was shown so far."""
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """``text`` begins with what was shown before."""
        new = text[len(self.text) :]
        self.text = text
        write(new, clean=self._terminal)


def write(text: str, *, clean: bool = False) -> None:
    """Write to standard output at once. ``clean``: without characters that steer a terminal."""
    sys.stdout.write(text.translate(_CONTROL) if clean else text)
    sys.stdout.flush()


def dimmed(text: str) -> str:
    """``text`` in the terminal's weak style."""
    return f"\x1b[2m{text}\x1b[0m"


def summary(output: RequestOutput, llm: LLM) -> str:
    """How much was generated, and how fast: one line. Of drafts what they brought since the engine
    was made."""
    metrics, completion = output.metrics, output.outputs[0]
    count = len(completion.token_ids)
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    begin, end = metrics.first_token_time, metrics.finished_time
    if begin is not None and end is not None and count > 1 and end > begin:
        parts.append(f"{(count - 1) / (end - begin):.1f} tok/s")
    if metrics.time_to_first_token is not None:
        parts.append(f"first token after {metrics.time_to_first_token * 1e3:.0f} ms")
    drafts = llm.stats().drafts
    if drafts.drafts:
        parts.append(f"{drafts.acceptance_length:.2f} tokens a step")
    if completion.finish_reason == "length":
        parts.append("stopped at the length limit")
    return ", ".join(parts)

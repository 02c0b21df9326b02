"""``reprise chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.failures import print_error
from reprise.cli.options import engine_options, sampling_options
from reprise.cli.streaming import Writer, load, stream, summary, write
from reprise.errors import CapacityError, RepriseError, RequestError

if TYPE_CHECKING:
    from reprise.llm import LLM
    from reprise.sampling_params import SamplingParams

MAX_TOKENS = 1024

HELP = """\
/reset  forget the conversation
/help   this list
/quit   leave, as Ctrl-D does
Ctrl-C  stop the answer"""


def chat(
    system: Annotated[
        str | None, typer.Option(help="System message that opens the conversation.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no summary line after an answer.")
    ] = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk with a model. /help lists the commands, Ctrl-D leaves.

    Works in a pipe too: every line of standard input is a turn, and the answers are printed.
    """
    llm = load(engine)
    if not getattr(llm.get_tokenizer(), "chat_template", None):
        raise RepriseError("this model has no chat template; use 'reprise generate' instead")
    params = llm.engine.default_sampling_params(**{"max_tokens": MAX_TOKENS, **sampling})
    Conversation(llm, params, system, quiet).run()


@dataclass
class Conversation:
    """The turns so far, and the loop that adds to them."""

    llm: LLM
    params: SamplingParams
    system: str | None
    quiet: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()
        self._terminal = sys.stdin.isatty()
        if self._terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing and history

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages = [] if self.system is None else [_message("system", self.system)]

    def run(self) -> None:
        """Take turns until the input ends."""
        if self._terminal:
            typer.secho("/help lists the commands, Ctrl-D leaves.", err=True, dim=True)
        while (line := self._read()) is not None:
            text = line.strip()
            if text == "/quit":
                return
            if text == "/reset":
                self.reset()
                typer.secho("conversation forgotten", err=True, dim=True)
            elif text == "/help":
                typer.secho(HELP, err=True, dim=True)
            elif text.startswith("/") and " " not in text:
                print_error(f"unknown command {text}; /help lists the commands")
            elif text:
                self.answer(text)

    def answer(self, text: str) -> None:
        """One turn.

        A refused one is dropped. An interrupted answer stays in the conversation as far as it came.
        """
        from reprise.engine import chat_prompt

        self.messages.append(_message("user", text))
        writer, output = Writer(), None
        try:
            prompt = chat_prompt(
                self.llm.get_tokenizer(), self.messages, add_generation_prompt=True
            )
            for output in stream(self.llm, prompt, self.params):
                writer.show(output.outputs[0].text)
        except KeyboardInterrupt:
            typer.secho(" (stopped)", err=True, dim=True, nl=False)
        except (CapacityError, RequestError) as error:
            self.messages.pop()
            remedy = "; /reset begins anew" if isinstance(error, CapacityError) else ""
            print_error(f"{error}{remedy}")
            return
        write("\n")
        self.messages.append(_message("assistant", writer.text))
        if output is not None and output.finished and not self.quiet:
            typer.secho(summary(output), err=True, dim=True)

    def _read(self) -> str | None:
        """The next line, or None at the end."""
        while True:
            try:
                return input("> " if self._terminal else "")
            except EOFError:
                if self._terminal:
                    write("\n")
                return None
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                typer.secho("\nCtrl-D leaves", err=True, dim=True)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(
        app,
        "chat",
        chat,
        sampling=sampling_options(max_tokens=MAX_TOKENS),
        engine=engine_options("skip_tokenizer_init"),
    )

"""``reprise chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import select
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.failures import print_error
from reprise.cli.options import ONE_ENGINE, engine_options, sampling_options
from reprise.cli.streaming import Writer, load, stream, summary, write
from reprise.errors import CapacityError, RepriseError, RequestError

if TYPE_CHECKING:
    from reprise.llm import LLM
    from reprise.sampling_params import SamplingParams

MAX_TOKENS = 1024

HELP = """\
/reset         forget the conversation
/system TEXT   set the system message; without a text, show it
/help          this list
/quit          leave, as /exit, /bye and Ctrl-D do
Ctrl-C         stop the answer
A block of lines that is pasted is one turn."""

LEAVE = ("/quit", "/exit", "/bye")
PASTE_SECONDS = 0.05
"""What a terminal has ready so soon behind a line was not typed."""


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
    known = ("chat_template", "encoder_texts")
    if not any(getattr(llm.engine.tokenizer, each, None) for each in known):
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
                import readline  # gives input() line editing and history

                # The terminal then says where a paste begins and ends.
                readline.parse_and_bind("set enable-bracketed-paste on")

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages = [] if self.system is None else [_message("system", self.system)]

    def run(self) -> None:
        """Take turns until the input ends."""
        if self._terminal:
            typer.secho("/help lists the commands, Ctrl-D leaves.", err=True, dim=True)
        while (line := self._read()) is not None:
            text = line.strip()
            name, _, rest = text.partition(" ")
            if text in LEAVE:
                return
            if text == "/reset":
                self.reset()
                typer.secho("conversation forgotten", err=True, dim=True)
            elif text == "/help":
                typer.secho(HELP, err=True, dim=True)
            elif name == "/system":
                self.instruct(rest.strip())
            elif text.startswith("/") and len(text.split()) == 1:
                print_error(f"unknown command {text}; /help lists the commands")
            elif text:
                self.answer(text)

    def instruct(self, text: str) -> None:
        """Set the system message of this conversation, or show it if ``text`` is empty."""
        if not text:
            typer.secho(self.system or "no system message", err=True, dim=True)
            return
        if self.system is not None:
            del self.messages[0]
        self.system = text
        self.messages.insert(0, _message("system", text))
        typer.secho("system message set", err=True, dim=True)

    def answer(self, text: str) -> None:
        """Take one turn.

        A refused one is dropped. An interrupted answer stays in the conversation as far as it came.
        """
        from reprise.engine import chat_prompt

        self.messages.append(_message("user", text))
        writer, output = Writer(), None
        try:
            prompt = chat_prompt(
                self.llm.engine.tokenizer, self.messages, add_generation_prompt=True
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
            typer.secho(summary(output, self.llm), err=True, dim=True)

    def _with_pasted(self, line: str) -> str:
        """A line and what a terminal that does not mark a paste has ready behind it."""
        lines = [line]
        with contextlib.suppress(EOFError):  # the next call meets it again
            while _more_is_there():
                lines.append(input())
        return "\n".join(lines)

    def _read(self) -> str | None:
        """The next line, or in a terminal the block that was pasted; None at the end."""
        while True:
            try:
                line = input("> " if self._terminal else "")
                return self._with_pasted(line) if self._terminal else line
            except EOFError:
                if self._terminal:
                    write("\n")
                return None
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                typer.secho("\nCtrl-D leaves", err=True, dim=True)


def _more_is_there() -> bool:
    """Whether standard input, a terminal, has another line ready."""
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    except (OSError, ValueError):  # where terminals are no files to wait for
        return False


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(
        app,
        "chat",
        chat,
        sampling=sampling_options(max_tokens=MAX_TOKENS),
        engine=engine_options("skip_tokenizer_init", *ONE_ENGINE),
    )

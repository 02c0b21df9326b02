"""``reprise generate``: complete a prompt, streaming to the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from reprise.cli.command import command
from reprise.cli.options import ONE_ENGINE, engine_options, sampling_options
from reprise.cli.streaming import Writer, dimmed, load, stream, summary, write

DEFAULT_PROMPT = "Once upon a time"
MAX_TOKENS = 256
DEMO_DRAFTS = {"method": "eagle3", "num_speculative_tokens": 3}
"""As many as a step of four tokens has room for: the next size has eight."""


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help=f"Text to complete; '-' reads standard input. Default: what is piped in, or "
            f"'{DEFAULT_PROMPT}'.",
            show_default=False,
        ),
    ] = None,
    echo: Annotated[
        bool | None,
        typer.Option(
            help="Print the prompt before its completion. Default: on a terminal, or if no "
            "prompt was given."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no summary line.")] = False,
    speculative: Annotated[
        bool,
        typer.Option(
            "--speculative",
            help="Draft with the demo model's head: the same text in fewer steps. For other "
            "models: --speculative-config.",
        ),
    ] = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Complete a prompt and print the text as it is generated.

    Without a model, the demo model that ships with Reprise answers:

        reprise generate "47 + 38 ="
    """
    if speculative:
        if "speculative_config" in engine:
            raise typer.BadParameter("--speculative and --speculative-config: give one of them")
        engine["speculative_config"] = DEMO_DRAFTS
    given = _given_prompt(prompt)
    text = DEFAULT_PROMPT if given is None else given
    llm = load(engine)
    params = llm.engine.default_sampling_params(**{"max_tokens": MAX_TOKENS, **sampling})
    outputs = stream(llm, text, params)
    terminal = sys.stdout.isatty()
    if echo or (echo is None and (terminal or given is None)):
        write(dimmed(text) if terminal else text)
    writer, output = Writer(), None
    for output in outputs:
        writer.show(output.outputs[0].text)
    write("\n")
    if output is not None and not quiet:
        typer.secho(summary(output, llm), err=True, dim=True)


def _given_prompt(argument: str | None) -> str | None:
    """The user's prompt: the argument or standard input; None if there is neither."""
    if argument == "-":
        return sys.stdin.read().removesuffix("\n")
    if argument is None and not sys.stdin.isatty():
        return sys.stdin.read().removesuffix("\n") or None
    return argument


def register(app: typer.Typer) -> None:
    """Add this command."""
    command(
        app,
        "generate",
        generate,
        sampling=sampling_options(max_tokens=MAX_TOKENS),
        engine=engine_options("skip_tokenizer_init", *ONE_ENGINE),
    )

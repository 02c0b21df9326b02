"""How a function becomes a command: shared options, logging, errors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from reprise.cli.failures import reported
from reprise.cli.fields import FieldOptions
from reprise.cli.logs import LogLevel, configure


class Command(TyperCommand):
    """A command whose options do not take one another for their values: what is left of
    ``--api-key $KEY --port 80`` where KEY is not set would make the flag the key."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes = self.takes(ctx)
        for word, following in itertools.pairwise(itertools.takewhile(lambda x: x != "--", args)):
            if takes.get(word) and self.is_option(following.partition("=")[0], takes):
                raise typer.BadParameter(
                    f"{word} has no value: what follows, {following}, is an option; where it is "
                    f"meant as the value, write {word}={following}",
                    ctx=ctx,
                )
        return super().parse_args(ctx, args)

    def is_option(self, name: str, takes: Mapping[str, bool]) -> bool:
        """Whether the command takes such a flag."""
        return name in takes

    def takes(self, ctx: Any) -> dict[str, bool]:
        """Whether a value follows, by flag."""
        found = {
            name: not (getattr(each, "is_flag", False) or getattr(each, "count", False))
            for each in self.params
            for name in (*each.opts, *each.secondary_opts)
            if name.startswith("-")
        }
        return {**found, **dict.fromkeys(self.get_help_option_names(ctx), False)}


COMMON = (
    inspect.Parameter(
        "log_level",
        inspect.Parameter.KEYWORD_ONLY,
        default=LogLevel.WARNING,
        annotation=Annotated[
            LogLevel, typer.Option(help="Least severe messages to show on standard error.")
        ],
    ),
    inspect.Parameter(
        "debug",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool, typer.Option("--debug", help="On an error, print the traceback.")
        ],
    ),
)


def command(
    app: typer.Typer,
    name: str,
    function: Callable[..., None],
    kind: type[Command] = Command,
    **groups: FieldOptions,
) -> None:
    """Add a command to ``app``.

    Args:
        app: Where to add it.
        name: What the user types.
        function: Its docstring is the help, its parameters are the command's own options; one that
            is called ``log_level`` takes the place of the common one.
        kind: Reads the command line.
        **groups: Parameters of ``function`` that are groups of options; it gets each as a
            dictionary of what the user gave.
    """
    app.command(name, cls=kind)(runnable(function, **groups))


def runnable(function: Callable[..., None], **groups: FieldOptions) -> Callable[..., None]:
    """A function that typer can make a command of; arguments as in :func:`command`."""
    own = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(function, eval_str=True).parameters.values()
        if each.name not in groups
    ]
    derived = [each for group in groups.values() for each in group.parameters()]
    names = {each.name for each in own}
    parameters = [*own, *derived, *(each for each in COMMON if each.name not in names)]
    flags = dict(_flags(parameters))

    def run(**arguments: Any) -> None:
        debug, level = arguments.pop("debug"), arguments["log_level"]
        if "log_level" not in names:
            del arguments["log_level"]
        given = {each: group.take(arguments) for each, group in groups.items()}
        with reported(debug, flags):
            configure(level)
            function(**arguments, **given)

    run.__name__ = function.__name__
    run.__doc__ = function.__doc__
    run.__module__ = function.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _flags(parameters: Iterable[inspect.Parameter]) -> Iterator[tuple[str, str]]:
    """The options among a command's parameters: name and long flag."""
    for each in parameters:
        for about in get_args(each.annotation):
            if isinstance(about, typer.models.OptionInfo):
                # In an annotation typer takes the first name for the default.
                names = (about.default, *(about.param_decls or ()))
                long = [name for name in names if isinstance(name, str) and name.startswith("--")]
                yield each.name, long[0] if long else "--" + each.name.replace("_", "-")

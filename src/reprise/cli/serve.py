"""``reprise serve``: the OpenAI API over HTTP."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from reprise import compiling
from reprise.cli.command import command
from reprise.cli.fields import FieldOptions, Special, json_object
from reprise.cli.logs import LogLevel
from reprise.cli.options import engine_options
from reprise.cli.vllm_flags import HANDED_ON, ServeCommand, flags_named, handed_on
from reprise.errors import ConfigError, RepriseError
from reprise.neutral import drop_neutral
from reprise.vllm_names import SERVER

PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "orjson", "prometheus_client")
"""Of the extra ``server``."""


def serve(
    served: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Local directory or Hugging Face id. Default: the bundled demo model.",
            show_default=False,
        ),
    ] = None,
    *,
    log_level: Annotated[
        LogLevel, typer.Option(help="Least severe messages to show on standard error.")
    ] = LogLevel.INFO,
    others: Annotated[list[str] | None, typer.Option(HANDED_ON, hidden=True)] = None,
    server: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Serve a model by the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models.

    SIGTERM and Ctrl-C let running requests end; a second one stops at once.
    """
    missing = [each for each in PACKAGES if importlib.util.find_spec(each) is None]
    if missing:
        raise RepriseError(
            f"'reprise serve' needs {', '.join(missing)}: pip install 'reprise[server]'"
        )
    from reprise.config import EngineConfig
    from reprise.server.logs import configure
    from reprise.server.options import ServerOptions
    from reprise.server.supervisor import Supervisor

    given = engine.pop("model", None)
    if served is not None and given not in (None, served):
        raise ConfigError(f"MODEL {served!r} and model={given!r} contradict each other; give one")
    options = ServerOptions(**server)
    with flags_named(others or []):
        config = EngineConfig(model=served or given, **engine, **_of_vllm(others or []))
    compiling.begin(config.device, config.dtype)
    configure(log_level, options.log_format, "serve")
    supervisor = Supervisor(config, options, log_level, announce=_announce)
    typer.secho(f"loading {config.model or 'the demo model'} for {supervisor.address}", err=True)
    supervisor.run()


def _of_vllm(others: Sequence[str]) -> dict[str, Any]:
    """Options of an engine, out of vLLM's flags; what the server alone would read asks for nothing.

    Raises:
        ConfigError: It asks for something.
    """
    given = handed_on(others)
    names = {name for group in SERVER for name in group.neutral}
    mine = {name: value for name, value in given.items() if name in names}
    drop_neutral(mine, SERVER, (), "option", ConfigError)
    return {name: value for name, value in given.items() if name not in names}


def _announce(address: str) -> None:
    typer.secho(f"ready: {address}", err=True, bold=True)


PANELS = {
    "Address": ("host", "port", "uds", "root_path", "api_server_count"),
    "Clients": (
        "served_model_name", "api_key", "allowed_origins", "allowed_methods", "allowed_headers",
        "allow_credentials", "page", "disable_fastapi_docs",
    ),
    "TLS": ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"),
    "Limits": (
        "max_num_queued_reqs", "max_num_queued_tokens", "max_header_bytes", "header_timeout",
        "max_body_bytes", "body_timeout", "max_completions", "response_store_bytes",
        "write_timeout", "keep_alive", "shutdown_timeout",
    ),
    "Answers": (
        "chat_template", "chat_template_content_format", "default_chat_template_kwargs",
        "trust_request_chat_template", "response_role", "reasoning_parser", "tool_call_parser",
        "enable_auto_tool_choice", "generation_config", "override_generation_config",
        "enable_force_include_usage",
    ),
    "Logs": ("log_format", "access_log"),
}  # fmt: skip


def _texts(text: str) -> list[str]:
    """One, or a list of them in JSON, as vLLM has it."""
    if not text.startswith("["):
        return [text]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not valid JSON: {error}") from None
    if not all(isinstance(each, str) for each in found):
        raise typer.BadParameter(f"{text!r} is no list of texts, such as '[\"*\"]'")
    return list(found)


def _joined(lists: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain(*lists))


def server_options() -> FieldOptions:
    """Options for the fields of :class:`reprise.server.options.ServerOptions`."""
    from reprise.server.options import ServerOptions

    texts = ("served_model_name", "api_key")
    lists = ("allowed_origins", "allowed_methods", "allowed_headers")
    objects = ("default_chat_template_kwargs", "override_generation_config")
    return FieldOptions(
        ServerOptions,
        panels=PANELS,
        special={
            **{name: Special(metavar="TEXT", parse=str, repeated=True) for name in texts},
            **{
                name: Special(metavar="TEXT", parse=_texts, repeated=True, collect=_joined)
                for name in lists
            },
            **{name: Special(metavar="JSON", parse=json_object) for name in objects},
            "no_access_log": Special(help="Log no line for each request."),
            "no_page": Special(help="Serve no page at / and no events at /live."),
        },
    )


def register(app: typer.Typer) -> None:
    """Add this command."""
    options = {"server": server_options(), "engine": engine_options()}
    command(app, "serve", serve, ServeCommand, **options)

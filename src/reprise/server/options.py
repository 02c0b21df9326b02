"""Every option of the HTTP server: one home, validated once."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from reprise.arguments import is_finite, is_whole, shown
from reprise.errors import ConfigError, RequestError
from reprise.jinja import parsed
from reprise.sampling_params import SamplingParams
from reprise.server.reasoning import PARSERS
from reprise.server.tools.formats import PARSERS as TOOL_PARSERS

ContentFormat = Literal["auto", "string", "openai"]
LogFormat = Literal["text", "json"]
CertReqs = Literal["none", "optional", "required"]

_LISTS = ("served_model_name", "api_key", "allowed_origins", "allowed_methods", "allowed_headers")


_OWN = ("n", "logprobs", "prompt_logprobs", "output_kind", "detokenize")
"""Sampling values on which the form of a reply depends."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of ``reprise serve``; names are ``vllm serve``'s where the meaning is the same.

    Raises:
        ConfigError: A value is out of range, or two options contradict each other.
    """

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` for all of this machine."""
    port: int = 8000
    """0: a free one, which is printed."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead."""
    served_model_name: Sequence[str] = ()
    """Name that clients give; repeatable. Default: the model's."""
    api_key: Sequence[str] = ()
    """Clients must send one of these keys; repeatable. Default: those in ``REPRISE_API_KEY`` or
    ``VLLM_API_KEY``."""
    api_server_count: int = 1
    """HTTP processes that share the port."""
    max_num_queued_reqs: int | None = None
    """Most requests that wait for the engine; further ones get status 429. None: any number."""
    max_num_queued_tokens: int | None = None
    """Most prompt tokens that wait for the engine, once for each completion; a request that would
    add to more gets status 429, unless none waits. None: any number."""
    max_body_bytes: int = 32 << 20
    """Largest body of a request; larger ones get status 413."""
    max_completions: int = 128
    """Most completions that one request may ask for: n times the number of prompts."""
    max_header_bytes: int = 64 << 10
    """Largest address and headers of a request together; larger ones get status 431."""
    header_timeout: float = 60.0
    """Seconds that a client may take to send them; then it gets status 408."""
    body_timeout: float = 60.0
    """Seconds that a client may take to send a body; then it gets status 408."""
    response_store_bytes: int = 64 << 20
    """Bytes of responses that the engine's process keeps for /v1/responses to go on from, those
    that were used last; 0: none."""
    write_timeout: float = 300.0
    """Seconds that a client may read nothing of its stream; then the request is aborted."""
    keep_alive: int = 75
    """Seconds that an idle connection stays open."""
    shutdown_timeout: float = 20.0
    """Seconds that running requests get to end when the server is told to stop."""
    chat_template: str | None = None
    """Jinja template, or a file that holds it, in place of the tokenizer's."""
    chat_template_content_format: ContentFormat = "auto"
    """How the template gets a message's text."""
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template that requests may override, such as {"enable_thinking": false}."""
    trust_request_chat_template: bool = False
    """Let requests bring a template of their own: a program that this server runs."""
    response_role: str = "assistant"
    """Role of the answers."""
    reasoning_parser: str = "auto"
    """Splits what the model thinks from its answer: ``auto`` (by the chat template), ``none``,
    ``qwen3`` or ``deepseek_r1``."""
    tool_call_parser: str = "auto"
    """Reads tool calls from outputs: ``auto`` (by the chat template), ``none``, ``hermes``,
    ``qwen3``, ``qwen3_coder``, ``llama3_json``, ``deepseek_v31`` or ``deepseek_v4``."""
    enable_auto_tool_choice: bool = False
    """Accepted for compatibility, without effect: tools are read wherever the parser is known."""
    generation_config: Literal["auto", "vllm"] = "auto"
    """Sampling values that requests leave out: ``auto`` takes the checkpoint's recommendation,
    ``vllm`` the OpenAI API's defaults."""
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    """Sampling values in place of these, such as {"temperature": 0.6}. As with vLLM,
    ``max_new_tokens`` is the most that any request gets."""
    enable_force_include_usage: bool = False
    """Every stream ends with its usage, asked for or not."""
    allowed_origins: Sequence[str] = ()
    """Origin of web pages that may call this server (CORS); repeatable, ``*`` for any."""
    allowed_methods: Sequence[str] = ("*",)
    """Method that they may use; repeatable."""
    allowed_headers: Sequence[str] = ("*",)
    """Header that they may send; repeatable."""
    allow_credentials: bool = False
    """They may send cookies and other credentials."""
    ssl_keyfile: str | None = None
    """Key of the TLS certificate."""
    ssl_certfile: str | None = None
    """TLS certificate; the server then speaks HTTPS."""
    ssl_ca_certs: str | None = None
    """Certificates that those of clients are checked against."""
    ssl_cert_reqs: CertReqs = "none"
    """Whether clients must bring certificates."""
    root_path: str = ""
    """Path that a proxy in front strips."""
    page: bool = True
    """Serve a page at / to chat and to watch the engine, and /live, its events."""
    disable_fastapi_docs: bool = False
    """Serve no /docs, /redoc and /openapi.json."""
    log_format: LogFormat = "text"
    """Of log lines on standard error."""
    access_log: bool = True
    """Log a line for each request; never for /health, /ready, /ping and /metrics."""

    def __post_init__(self) -> None:
        for each in _LISTS:
            values = getattr(self, each)
            given = (values,) if isinstance(values, str) else tuple(values)
            if not all(isinstance(value, str) and value for value in given):
                raise ConfigError(f"{each} has an empty name: give texts")
            object.__setattr__(self, each, given)
        if not self.api_key:
            keys = [os.environ.get(name) for name in ("REPRISE_API_KEY", "VLLM_API_KEY")]
            object.__setattr__(self, "api_key", tuple(each for each in keys if each))
        self._check_numbers()
        self._check_choices()
        self._check_files()
        if "*" in self.allowed_origins and self.allow_credentials:
            raise ConfigError(
                "allowed_origins='*' and allow_credentials=True: browsers refuse both together; "
                "name the origins"
            )
        for name in ("default_chat_template_kwargs", "override_generation_config"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a JSON object")
        self._check_sampling()

    def _check_numbers(self) -> None:
        if not is_whole(self.port) or not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port!r} must be from 0 to 65535")
        for name, least in (
            ("api_server_count", 1), ("max_num_queued_reqs", 1), ("max_num_queued_tokens", 1),
            ("max_body_bytes", 1), ("max_completions", 1), ("max_header_bytes", 1),
            ("response_store_bytes", 0),
            ("header_timeout", 0.001), ("body_timeout", 0.001), ("write_timeout", 0.001),
            ("keep_alive", 1), ("shutdown_timeout", 0.0),
        ):  # fmt: skip
            value, whole = getattr(self, name), isinstance(least, int)
            if value is None and name in ("max_num_queued_reqs", "max_num_queued_tokens"):
                continue
            if not (is_whole(value) if whole else is_finite(value)) or value < least:
                wanted = "whole number" if whole else "number"
                raise ConfigError(f"{name}={value!r} must be a {wanted} of at least {least:g}")

    def _check_choices(self) -> None:
        for name, kind in (
            ("chat_template_content_format", ContentFormat), ("log_format", LogFormat),
            ("ssl_cert_reqs", CertReqs), ("generation_config", Literal["auto", "vllm"]),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kind))}"
                )
        if self.reasoning_parser not in ("auto", *PARSERS):
            raise ConfigError(
                f"reasoning_parser={self.reasoning_parser!r} must be one of auto, "
                f"{', '.join(PARSERS)}"
            )
        if self.tool_call_parser not in ("auto", "none", *TOOL_PARSERS):
            raise ConfigError(
                f"tool_call_parser={self.tool_call_parser!r} must be one of auto, none, "
                f"{', '.join(TOOL_PARSERS)}"
            )

    def _check_files(self) -> None:
        if (self.ssl_keyfile is not None) and self.ssl_certfile is None:
            raise ConfigError(f"ssl_keyfile={self.ssl_keyfile!r} needs ssl_certfile")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}={path!r} is no file")
        if self.ssl_certfile is not None:
            self._check_certificate(self.ssl_certfile)

    def _check_certificate(self, certificate: str) -> None:
        """Each HTTP process would end at it; and, behind a pass phrase, ask the terminal."""
        import ssl

        def no_password() -> str:
            raise ConfigError(
                f"ssl_keyfile={self.ssl_keyfile or certificate!r} is encrypted: give one without a "
                "pass phrase"
            )

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate, self.ssl_keyfile, no_password)
        except OSError as error:
            own = "" if self.ssl_keyfile is None else f" and ssl_keyfile={self.ssl_keyfile!r}"
            raise ConfigError(
                f"ssl_certfile={certificate!r}{own}: no certificate with its key, in PEM ({error})"
            ) from error
        try:
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(
                f"ssl_ca_certs={self.ssl_ca_certs!r} has no certificates in PEM ({error})"
            ) from error

    def _check_sampling(self) -> None:
        given = dict(self.override_generation_config)
        limit = given.pop("max_new_tokens", None)
        given.pop("do_sample", None)
        for name in _OWN:
            if name in given:
                raise ConfigError(
                    f"override_generation_config has {name}={given[name]!r}: each request says it, "
                    "since its reply has another form then; leave it out"
                )
        try:
            SamplingParams(**given, **({} if limit is None else {"max_tokens": limit}))
        except RequestError as error:
            raise ConfigError(f"override_generation_config: {error}") from error

    @property
    def most_new_tokens(self) -> int | None:
        """That a completion may have, whatever its request says; None: any number."""
        found: int | None = self.override_generation_config.get("max_new_tokens")
        return found

    @functools.cached_property
    def template(self) -> str | None:
        """``chat_template``'s text.

        Raises:
            ConfigError: It names a file that cannot be read, or is no template.
        """
        given = self.chat_template
        if given == "":
            raise ConfigError("chat_template='' is empty: give a file, or leave it out")
        text = given
        try:
            if given is not None and not ("{" in given or "\n" in given):
                text = Path(given).read_text(encoding="utf-8")
            if text is not None:
                parsed(text)
        except OSError as error:
            raise ConfigError(f"chat_template={given!r}: {error.strerror}") from error
        except (UnicodeDecodeError, RequestError) as error:
            raise ConfigError(f"chat_template={shown(given)}: {error}") from error
        return text

    def to_json(self) -> str:
        """The options as JSON, for another process of the server."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerOptions:
        """What :meth:`to_json` gave."""
        return cls(**json.loads(text))

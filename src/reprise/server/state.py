"""What the handlers of one HTTP process share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reprise.arguments import shown
from reprise.errors import RequestError
from reprise.sampling_params import SamplingParams
from reprise.server.caller import Callers
from reprise.server.client import EngineClient
from reprise.server.errors import ApiError, unavailable
from reprise.server.fields import MOST
from reprise.server.options import ServerOptions

logger = logging.getLogger(__name__)


@dataclass
class ServerState:
    """One for each process."""

    options: ServerOptions
    client: EngineClient
    callers: Callers = field(default_factory=Callers)
    draining: bool = False
    """No new requests are taken."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts of the engine.

        Raises:
            ApiError: There is none, or it takes no more requests.
        """
        self.check_open()
        assert self.client.facts is not None
        return self.client.facts

    def check_open(self) -> None:
        """
        Raises:
            ApiError: No request is taken.
        """
        if self.draining:
            raise unavailable("the server is shutting down")
        if self.client.lost is not None:
            raise unavailable(self.client.lost)
        if self.client.facts is None:
            raise unavailable("the model is being loaded; try again later")

    @property
    def names(self) -> list[str]:
        """Names of the model, for clients."""
        given = list(self.options.served_model_name)
        return given or [str((self.client.facts or {}).get("model", ""))]

    def model_name(self, asked: str | None) -> str:
        """The name of a reply.

        Raises:
            ApiError: Another model is asked for.
        """
        names = self.names
        if asked is None or asked == "":
            return names[0]
        if asked not in names:
            raise ApiError(
                404,
                f"The model {shown(asked)} does not exist; this server has "
                f"{', '.join(map(repr, names))}",
                code="model_not_found",
                param="model",
            )
        return asked

    def sampling_defaults(self) -> dict[str, Any]:
        """Defaults of what requests leave out, and the server's limit to what they say."""
        found: dict[str, Any] = {}
        given = self.options.override_generation_config
        if self.options.generation_config == "auto":
            found = dict((self.client.facts or {}).get("recommended", {}))
            if given.get("temperature") is not None:
                found.pop("do_sample", None)  # the checkpoint's word against the operator's
        found.update(given)
        limit = found.pop("max_new_tokens", None)
        if limit is not None and "max_tokens" not in found:
            found["max_tokens"] = limit
        if found.pop("do_sample", None) is False:
            found["temperature"] = 0.0
        if self.options.most_new_tokens is not None:
            found[MOST] = self.options.most_new_tokens
        return found

    def log_defaults(self) -> None:
        """Once: many are surprised by what a checkpoint recommends."""
        found = self.sampling_defaults()
        try:
            SamplingParams(**{name: value for name, value in found.items() if name != MOST})
        except RequestError as error:
            logger.error("sampling values of the server are not valid: %s", error)
        if found:
            logger.info(
                "requests that do not say otherwise are sampled with %s (generation_config=%s, "
                "override_generation_config)", found, self.options.generation_config,
            )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """A fingerprint of all that decides which tokens come."""
        facts = self.client.facts or {}
        parts = [str(facts.get(name)) for name in ("version", "model", "dtype", "device")]
        return "fp_" + hashlib.blake2b("\n".join(parts).encode(), digest_size=5).hexdigest()
